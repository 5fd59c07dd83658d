"""Renders one chat template in a process of its own. Run by `aprjax.text.template`, never imported by it.

A template is code from an untrusted file. Jinja's sandbox keeps it from reaching Python, and a budget
of steps stops loops, but no check inside the process can bound the memory of `x.replace('a', x)` or
the time of `9**9**9`. So the process limits itself before it looks at the template, and its parent
waits only so long. Only the standard library and jinja2 are imported.

Protocol: a JSON object on stdin, a JSON object on stdout: `{"text": …}` or `{"error": …, "line": …}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn


def limit_resources(cpu_seconds: int, memory_bytes: int) -> None:
    """Bounds this process's CPU time and address space, where the platform can (not on Windows)."""
    try:
        import resource
    except ImportError:
        return
    for name, value in (("RLIMIT_CPU", cpu_seconds), ("RLIMIT_AS", memory_bytes), ("RLIMIT_CORE", 0)):
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (bound, bound))
        except (ValueError, OSError):
            continue  # macOS refuses RLIMIT_AS; the parent's timeout remains


class Budget:
    """Counts loop iterations and calls, which is all that makes a template run long by itself."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.left = steps

    def spend(self) -> None:
        """One step.

        Raises:
            RuntimeError: none left.
        """
        self.left -= 1
        if self.left < 0:
            raise RuntimeError(f"the template ran for more than {self.steps} loop iterations and calls")

    def iterate(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each for one step."""
        for item in items:
            self.spend()
            yield item


def make_environment(budget: Budget) -> Any:
    """The environment that Hugging Face's `apply_chat_template` renders in, with every loop and call budgeted."""
    from datetime import datetime

    import jinja2
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer

    class GenerationTag(Extension):
        """`{% generation %}` marks the assistant's words for training; rendering only passes them through."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a plain set

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class BudgetedLoops(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "budgeted", [], [], None, None).set_lineno(node.lineno)
            return node

    class Environment(ImmutableSandboxedEnvironment):
        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            return BudgetedLoops().visit(super()._parse(source, name, filename))

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            budget.spend()
            return super().call(context, obj, *args, **kwargs)

    class PlainNamespace(Namespace):
        """A namespace without underscored names, which could pass for Python's own attributes."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *values = args
            attributes = dict(*values, **kwargs)
            for key in attributes:
                PlainNamespace.check(key)
            Namespace.__init__(self, attributes)

        def __setitem__(self, key: str, value: Any) -> None:
            PlainNamespace.check(key)
            super().__setitem__(key, value)

        @staticmethod
        def check(key: Any) -> None:
            if isinstance(key, str) and key.startswith("_"):
                raise SecurityError(f"a namespace has no attribute {key!r}")

    def raise_exception(message: Any) -> NoReturn:
        raise jinja2.TemplateError(f"the template refuses these messages: {message}")

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    # A function, since the type itself has attributes.
    def plain_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    # Jinja's own filter escapes HTML.
    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters.update(tojson=tojson, budgeted=budget.iterate)
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=strftime_now,
        namespace=PlainNamespace,
        dict=plain_dict,
    )
    environment.globals.pop("lipsum")  # random text has no place in a prompt
    return environment


def render(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    import jinja2

    try:
        template = make_environment(Budget(request["steps"])).from_string(request["template"])
        pieces, length = [], 0
        for piece in template.generate(**request["variables"]):
            length += len(piece)
            if length > request["characters"]:
                return {"error": f"the rendered text is longer than {request['characters']} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"syntax: {error.message}", "line": error.lineno}
    except RecursionError:
        return {"error": "the template nests or recurses too deeply"}
    except MemoryError:
        return {"error": f"the template needs more than {request['memory_bytes'] >> 20} MiB"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": f"the template does what its sandbox forbids: {error}", "line": template_line(error)}
    except Exception as error:  # whatever an untrusted template provokes becomes one sentence
        kind = "" if isinstance(error, jinja2.TemplateError | RuntimeError) else f"{type(error).__name__}: "
        return {"error": f"{kind}{error}", "line": template_line(error)}


def template_line(error: BaseException) -> int | None:
    """The template's line in which an error arose: jinja2 rewrites tracebacks to show it."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line


def main() -> None:
    """Reads the request, renders, writes the answer."""
    request = json.loads(sys.stdin.buffer.read())
    limit_resources(request["cpu_seconds"], request["memory_bytes"])
    sys.path[:] = request["path"]
    sys.stdout.write(json.dumps(render(request)))


if __name__ == "__main__":
    main()
