"""Threads that read ahead, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from mmalign.data.records import EndOfSource

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def in_order(function: Callable[[_In], _Out], items: Iterable[_In], workers: int) -> Iterator[_Out]:
    """map in threads, its results in order, running ahead by at most twice the number of workers; the end of a source is its end."""
    with ThreadPoolExecutor(workers) as pool, suppress(EndOfSource):
        waiting: deque[Future[_Out]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
