"""Files that are whole whenever one looks, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ecoformer.errors import InputError

_BYTES_TO_SEND = 8 * 2**20


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        OSError: also for a FIFO, a socket or a device, which would block or never end.
    """
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    # Without waiting for somebody who writes into a FIFO; nothing changes for a regular file.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    # open() itself refuses folders.
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a FIFO, socket or device, not a file", path)
    return descriptor


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, and its folder if it is missing.

    Raises:
        InputError: the disk refuses; what stood under ``path`` before is untouched.
    """
    with open_atomic(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when the block ends well, and vanishes otherwise.

    It can be written and read. Its folder is made if need be.

    Raises:
        InputError: the disk refuses; what stood under ``path`` before is untouched.
    """
    # In the same folder, since only within one file system is a rename a single step.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with io.BufferedRandom(_EagerFile(temporary, "x+b")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch.save wraps what the disk said into an error of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if isinstance(cause, OSError):
            raise InputError(
                f"{path}: cannot be written ({cause.strerror or cause}), nothing was changed; "
                "free space or get the right to write there, or choose another folder."
            ) from error
        raise
    # Flushes the new name. Some file systems refuse; either name leads to a whole file.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_stale(path: Path, *, min_age_s: float = 0.0) -> None:
    """Remove what processes left that were killed while they wrote a file.

    ``min_age_s`` is how long nobody has written to it, where others may write the same file.
    """
    newest = time.time() - min_age_s
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if stale.stat().st_mtime <= newest:
                stale.unlink()


class _EagerFile(io.FileIO):
    """Starts writing to the disk at once, so that the flush at the end waits less."""

    _num_sent = 0

    def write(self, data: Any) -> int:
        num_bytes = super().write(data)
        end = self.tell()
        if sys.platform == "linux" and end - self._num_sent > _BYTES_TO_SEND:
            # Advice only, which some file systems do not take.
            with contextlib.suppress(OSError):
                os.posix_fadvise(
                    self.fileno(), self._num_sent, end - self._num_sent, os.POSIX_FADV_DONTNEED
                )
            self._num_sent = end
        return num_bytes
