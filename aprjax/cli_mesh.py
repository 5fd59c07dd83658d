"""The option `--mesh`, for every command that runs a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

Mesh = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Split each checkpoint's weights over N devices (docs/devices.md)."),
]


def over_devices(function: Callable[..., int]) -> Callable[..., int]:
    """Gives a command the option `--mesh`: what it packs is split over so many devices.

    Other engines' sides (llama.cpp, transformers) run where they always do. Stands below `@command`.
    """

    @wraps(function)
    def run(*arguments: Any, mesh: int | None = None, **options: Any) -> int:
        if mesh is None:
            return function(*arguments, **options)
        from aprjax.qwen2.sharding import MeshError, device_mesh, use_mesh

        try:
            devices = device_mesh(mesh)
        except MeshError as error:
            raise typer.BadParameter(str(error), param_hint="'--mesh'") from None
        with use_mesh(devices):
            return function(*arguments, **options)

    signature = inspect.signature(function, eval_str=True)
    option = inspect.Parameter("mesh", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Mesh)
    # typer reads both: the order of the options from the one, their types from the other. Annotations that are still
    # text would be looked up in this module, which has not their names.
    vars(run)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), option])
    run.__annotations__ = {**function.__annotations__, "mesh": Mesh}
    return run
