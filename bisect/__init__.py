"""Bisection algorithms: the names of the standard library's `bisect`, which this package stands before.

From the root of this repository `import bisect` finds this package first, and `random`, `statistics`
and jax's dependencies import it. So it holds the standard names and nothing else, and the command
`python -m bisect` is in `__main__`. `aprjax/front_door.py` has the other half.
"""

try:
    from _bisect import bisect_left, bisect_right, insort_left, insort_right
except ImportError:
    # An interpreter without the C module has the same functions in the source of the standard module,
    # which lies beside `os` and is out of reach by name: the name leads here.
    import os
    from runpy import run_path

    _standard = run_path(os.path.join(os.path.dirname(os.__file__), "bisect.py"))
    bisect_left, bisect_right = _standard["bisect_left"], _standard["bisect_right"]
    insort_left, insort_right = _standard["insort_left"], _standard["insort_right"]
    del os, run_path, _standard

bisect = bisect_right
insort = insort_right
