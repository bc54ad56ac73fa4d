"""Threads of a process: how many compute, how they wait, and one for what may never return."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def limit_spinning() -> None:
    """Let threads of OpenMP spin less before they sleep; before PyTorch is imported.

    By default they spin 300,000 times, some 8 ms, where they wait, and beside other jobs take the
    time of the thread that they wait for. On two cores that some 12 other jobs shared, a training
    step with two threads took 7.9 times as long as with one, with a limit of 10,000 1.2 times, of
    3,000 0.7 times. To sleep at once costs half as much again on quiet cores. What the user has
    set stays. ``ecoformer benchmark threads`` measures it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


@contextmanager
def one_thread(*, if_small: bool) -> Iterator[None]:
    """Compute on the CPU with the calling thread alone for a block, if its operations are small.

    Threads meet at the end of each operation. Where that takes no longer than the meeting, they
    gain nothing, and beside other jobs an operation of 0.02 ms waits milliseconds for a core.
    """
    import torch

    num_threads = torch.get_num_threads()
    if not if_small or num_threads == 1:
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(num_threads)


def call_within(seconds: float, action: Callable[[], T]) -> T:
    """Call what may never return, in a thread that is left alone then.

    Raises:
        TimeoutError: it has not returned; and what the action raises.
    """
    outcomes: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((action(), None))
        except BaseException as error:
            outcomes.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcomes.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
