"""The torchrun that started a rank: the rank ends with it, and ends it where it hangs."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from ecoformer.errors import EXIT_FAILED, print_error

_SECONDS_BETWEEN_LOOKS = 0.5
# How long torchrun has to end once its ranks have, and to obey SIGTERM.
_SECONDS_TO_END = 24.0
_SECONDS_TO_OBEY = 4.0
_NAMES = {"torchrun", "torch.distributed.run", "torch.distributed.launch"}


@cache
def end_with_torchrun() -> None:
    """End this process where the torchrun that started it was killed, which it is not told of.

    It would go on, and write, beside those that the next torchrun starts. The kernel's own death
    signal counts the end of the thread that started a process, too.
    """
    launcher = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        # Without waiting for anything: others of this run may be gone as well.
        with suppress(OSError):
            print_error("torchrun is gone; what was saved is untouched.")
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, daemon=True).start()


def end_hanging_torchrun(timeout_s: float) -> None:
    """End the torchrun that started this rank, if it neither ends nor starts ranks after it.

    For a rank that cannot reach the others. A torchrun with c10d rendezvous asks the store of
    another host without a limit: behind a dead link it was still there 518 s after its ranks, deaf
    to SIGTERM. A process of its own watches it from the end of this rank on. A parent whose
    command is not torchrun's is left alone, whatever the environment says.

    Args:
        timeout_s: how long torchrun may wait for the other hosts where it has restarts left;
            without, it has 24 s.
    """
    launcher = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ or not _is_torchrun(launcher):
        return
    count, limit = (
        int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    seconds = _SECONDS_TO_END + (timeout_s if count < limit else 0)
    # Kernels before 5.3 have no descriptors of processes, and there it stays.
    with suppress(OSError):
        # Unlike its number, this means no other process once torchrun has ended.
        descriptor = os.pidfd_open(launcher)
        words = map(str, (os.getpid(), launcher, descriptor, seconds))
        subprocess.Popen(
            [sys.executable, "-m", __name__, *words],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            # Or torchrun's kill of this rank's session would take it along.
            start_new_session=True,
        )


def _is_torchrun(pid: int) -> bool:
    """Tell by the program that Python runs there: the first word that is no option."""
    with suppress(OSError):
        [_, *words] = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        return next((Path(word).name in _NAMES for word in words if word[:1] != "-"), False)
    return False


def _watch(rank: int, launcher: int, descriptor: int, seconds: float) -> None:
    while os.getppid() == rank:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if _has_ended(descriptor, _SECONDS_BETWEEN_LOOKS) or _has_started_ranks(launcher):
            return
    print(
        f"torchrun ({launcher}) has neither ended nor started ranks {seconds:.0f} s after its "
        "last one, which could not reach the others: ending it.",
        file=sys.stderr,
        flush=True,
    )
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        if not _has_ended(descriptor, _SECONDS_TO_OBEY):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def _has_ended(descriptor: int, timeout_s: float) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def _has_started_ranks(launcher: int) -> bool:
    """Tell whether it has children younger than this process, which began before a rank ended."""
    own = _read_stat(os.getpid())
    assert own is not None
    numbers = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    stats = (stat for number in numbers if (stat := _read_stat(number)) is not None)
    return any(parent == launcher and began > own[1] for parent, began in stats)


def _read_stat(pid: int) -> tuple[int, int] | None:
    """(parent, start in the kernel's ticks), or None where it is gone."""
    with suppress(OSError):
        # The command's name stands before them, in brackets, and may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[1]), int(fields[19])
    return None


if __name__ == "__main__":
    _rank, _launcher, _descriptor, _seconds = sys.argv[1:]
    _watch(int(_rank), int(_launcher), int(_descriptor), float(_seconds))
