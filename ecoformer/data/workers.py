"""The processes that read images for another: their signals, and what ends them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Collection, Iterator
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from ecoformer.errors import InputError
from ecoformer.memory import give_memory_back

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


def prepare_worker(worker: int) -> None:
    """Leave signals to the process that reads from this one, and do not comment on images.

    Ctrl-C and a scheduler's signals reach each process of a job. A worker that ends at one makes
    PyTorch raise in the trainer, wherever it is just then, before it can save and stop.
    """
    # Pillow remarks on damaged metadata, a line an image.
    warnings.filterwarnings("ignore", module="PIL")
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def end_workers(spared: Collection[BaseProcess]) -> None:
    """End those that read for this process, also in the middle of an image that never ends.

    At exit PyTorch waits for each of them, five seconds where one is busy. Children that are
    ``spared`` are somebody else's.
    """
    for worker in multiprocessing.active_children():
        if worker not in spared:
            worker.terminate()


class WorkerWatch:
    """Iterates over a loader, and says in one line where one of its workers was killed.

    PyTorch would raise from a signal handler, in the middle of whatever the process does then: a
    step, or a save. Here it is only raised where a batch is waited for, after up to five seconds.
    """

    def __init__(self) -> None:
        self._workers: list[BaseProcess] = []

    def iterate(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield the batches.

        Raises:
            InputError: a worker was killed.
        """
        if loader.num_workers and not self._workers:
            # A forked process shares this heap, holes and all, until this one fills them again: a
            # step on the CPU has gigabytes of them.
            give_memory_back()
        others = multiprocessing.active_children()
        is_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD) if is_main else None
        batches = iter(loader)
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        # Persistent workers start at the first iteration alone.
        self._workers += [one for one in multiprocessing.active_children() if one not in others]
        try:
            yield from batches
        except RuntimeError as error:
            codes = [worker.exitcode for worker in self._workers if worker.exitcode]
            if not codes:
                raise
            how = signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit code {codes[0]}"
            raise InputError(
                f"a process that reads data was ended by {how}, as where memory runs out; free "
                "memory or /dev/shm, or lower --num-workers, and repeat the command."
            ) from error


def _end_when_parent_says() -> None:
    assert sys.platform == "linux"
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    # As PyTorch's workers end: any other way counts as a failure.
    os._exit(0)
