"""`Behind`: work that follows in a thread of its own, as writing a file follows computing what is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Behind:
    """Runs what it is given, one after the other, in one thread of its own.

    Use it as a context manager; when it is left without an error, everything is done;
    with one, what has not begun is dropped.

    Args:
        most_bytes: how much of what it was given may wait. What is larger waits alone.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._held = most_bytes, 0
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[tuple[Future[Any], int]] = deque()

    def __call__(self, run: Callable[[], Any], nbytes: int = 0) -> None:
        """Queues a call that holds on to so many bytes; waits while there is no room for them.

        Raises:
            Exception: what an earlier call has raised, as soon as that is known.
        """
        while self._waiting and (self._waiting[0][0].done() or self._held + nbytes > self._most):
            self._first()
        self._waiting.append((self._pool.submit(run), nbytes))
        self._held += nbytes

    def _first(self) -> None:
        done, nbytes = self._waiting.popleft()
        done.result()
        self._held -= nbytes

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._first()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
