"""How a process that reads images for another behaves: silent, and loyal."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Collection
from multiprocessing.process import BaseProcess


def prepare_worker(worker: int) -> None:
    """Leave signals to the process that reads from this one, and do not comment on images.

    Ctrl-C and a scheduler's signals reach each process of a job. A worker that ends at one makes
    PyTorch raise in the trainer, wherever it is just then, before it can save and stop.

    Args:
        worker: its number, which nothing depends on.
    """
    # Pillow remarks on damaged metadata, a line an image.
    warnings.filterwarnings("ignore", module="PIL")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def end_workers(spared: Collection[BaseProcess] = ()) -> None:
    """End those that read for this process, also in the middle of an image that never ends.

    At exit PyTorch waits for each of them, five seconds where one is busy.

    Args:
        spared: children of this process that are somebody else's.
    """
    for worker in multiprocessing.active_children():
        if worker not in spared:
            worker.terminate()


def _end_when_parent_says() -> None:
    assert sys.platform == "linux"
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    # As PyTorch's workers end: any other way counts as a failure.
    os._exit(0)
