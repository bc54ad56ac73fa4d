"""The folder of a run, which no other run writes to meanwhile, and which stays where it is."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ecoformer.errors import InputError
from ecoformer.ranks import is_main, run_on_main

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
# What is half written when a run is killed.
_HALF = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
# A run that was killed a moment ago may still be on its way out.
_PATIENCE_S = 5.0

_logger = logging.getLogger(__name__)


class RunFolder:
    """An output folder; rank 0 holds its lock, which ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._is_new = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out for a block; every rank must call.

        Raises:
            InputError: another run writes there.
        """
        run_on_main(self._acquire)
        try:
            yield
        finally:
            if is_main():
                self._release()

    def check(self) -> None:
        """Raise InputError where the folder is no longer that which the run began in."""
        if self._descriptor is not None and not self._is_there(self._descriptor):
            raise InputError(
                f"{self.path} was removed or renamed while the run wrote to it (or {LOCK} in it "
                "was), so nothing more is written; put it back and repeat the command to go on."
            )

    def _is_there(self, descriptor: int) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path / LOCK))
        return False

    def _acquire(self) -> None:
        end = time.monotonic() + _PATIENCE_S
        try:
            # config.yaml and checkpoints hold it as text.
            str(self.path).encode()
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            while not self._try_lock():
                if time.monotonic() > end:
                    raise InputError(
                        f"{self.path}: another run writes there{self._tell_owner()}; wait for its "
                        "end, stop it, or choose another --output-dir."
                    )
                time.sleep(0.1)
            # Nobody else writes now; of what is not saved again, these would stay.
            for stale in self.path.glob(".*.tmp"):
                if _HALF.fullmatch(stale.name):
                    stale.unlink()
        except UnicodeEncodeError:
            raise InputError(
                f"--output-dir {self.path} is not UTF-8; choose another name."
            ) from None
        except OSError:
            # What cannot be written is told where it is written.
            return

    def _try_lock(self) -> bool:
        if fcntl is None:
            return True
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Unlike those of flock, not shared with data workers, which may outlive a kill.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return False
        except OSError as error:
            # Some network disks have no locks: better a run than none.
            os.close(descriptor)
            _logger.warning(
                "%s: its disk has no locks (%s), so nothing keeps a second run out",
                *(self.path, error.strerror or error),
            )
            return True
        # Its owner may have removed it between the two calls.
        if not self._is_there(descriptor):
            os.close(descriptor)
            return False
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor
        return True

    def _tell_owner(self) -> str:
        with suppress(OSError):
            owner = (self.path / LOCK).read_text(errors="replace").strip()
            return f" ({owner})" if owner else ""
        return ""

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if self._is_there(descriptor):
            with suppress(OSError):
                (self.path / LOCK).unlink()
                if self._is_new:
                    # Where the run was refused; others are not empty.
                    self.path.rmdir()
        os.close(descriptor)
