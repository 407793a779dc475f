"""One batch a core: products of a thousand tokens lose less so than when each of them is split over all cores."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Work = TypeVar("Work")
Result = TypeVar("Result")

_AHEAD = 4
"""Pieces of work for each core that are handed out before the first of them is taken."""

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_cores = 0


def each_on_a_core(do: Callable[[Work], Result], works: Sequence[Work]) -> Iterator[tuple[Work, Result]]:
    """Each piece of work and its result, in order. Several are under way at once, each in a thread that computes alone.

    PyTorch's number of threads says how many; results that nobody has taken yet are few at any time. A few pieces of work are done one after the other, by all threads together.
    """
    cores = torch.get_num_threads()
    pool = None if cores == 1 or len(works) < cores else _workers(cores)
    if pool is None:
        yield from ((work, do(work)) for work in works)
        return
    ahead: deque[tuple[Work, Future[Result]]] = deque()
    try:
        for work in works:
            ahead.append((work, submit(pool, partial(do, work))))
            if len(ahead) == _AHEAD * cores:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()
    finally:
        for _, future in ahead:
            future.cancel()


def in_shares(do: Callable[[Array], Result], rows: Array, fewest: int) -> list[Result]:
    """What is made of rows: a share of them for each core, where that is `fewest` at least, else of all by all cores together."""
    cores = torch.get_num_threads()
    if cores == 1 or len(rows) < cores * fewest:
        return [do(rows)]
    return [found for _, found in each_on_a_core(do, np.array_split(rows, cores))]


def submit(pool: ThreadPoolExecutor, do: Callable[[], Result]) -> Future[Result]:
    """The work in a thread of the pool; at once, in this one, if the interpreter is shutting down."""
    try:
        return pool.submit(do)
    except RuntimeError:
        done: Future[Result] = Future()
        try:
            done.set_result(do())
        except Exception as error:
            done.set_exception(error)
        return done


def _workers(cores: int) -> ThreadPoolExecutor | None:
    """The threads of this process, shared by all encoders; None if no threads can be started any more."""
    global _pool, _cores
    with _lock:
        if _pool is None or _cores != cores:
            together = threading.Barrier(cores + 1)

            def alone() -> None:
                torch.get_num_threads()  # a thread takes over the process's setting when it first asks: let that be over
                torch.set_num_threads(1)
                together.wait()

            pool = ThreadPoolExecutor(cores, "embell-worker", initializer=alone)
            try:
                for _ in range(cores):
                    pool.submit(int)
                together.wait()
            except RuntimeError:
                together.abort()
                return None
            except BaseException:
                together.abort()
                raise
            finally:
                # The setting is the thread's own, but new threads start with what was set last, anywhere.
                torch.set_num_threads(cores)
            _pool, _cores = pool, cores
        return _pool


def _after_fork() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()  # the threads stayed in the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
