"""What a run says while it goes on, and what it leaves written."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ecoformer.engine.folder import RunFolder
from ecoformer.errors import InputError, print_records
from ecoformer.files import write_text
from ecoformer.ranks import is_main, run_on_main

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0

_logger = logging.getLogger(__name__)


@contextmanager
def print_log() -> Iterator[None]:
    """Let rank 0 print what the package logs, and the others their warnings, inside a block."""
    # Asked for each record: ranks may be joined inside the block only.
    with print_records(lambda record: is_main() or record.levelno >= logging.WARNING):
        yield


def format_seconds(seconds: float) -> str:
    """Write a duration as ``h:mm:ss``, after ``1 day,`` and the like where it lasts so long."""
    return str(timedelta(seconds=round(seconds)))


def track(
    items: Iterable[T],
    name: str,
    *,
    total: int,
    start: int = 0,
    note: Callable[[], str] = str,
) -> Iterator[T]:
    """Pass items through; rank 0 shows a bar on a terminal and a line now and then elsewhere.

    Args:
        total: items in all, those before ``start`` included.
        start: items that an earlier process has done.
        note: gives what stands behind the numbers, when something is shown.
    """
    if not is_main():
        yield from items
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(items, name, total=total, initial=start, dynamic_ncols=True, leave=False) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note(), refresh=False)
    else:
        began = last = time.monotonic()
        for count, item in enumerate(items, start=start + 1):
            yield item
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES:
                last = now
                left = format_seconds((now - began) / (count - start) * (total - count))
                parts = (f"{name} {count}/{total}", note(), f"{left} left")
                print(*filter(None, parts), file=sys.stderr, flush=True)


def read_log(folder: Path) -> list[dict[str, float]]:
    """Read ``log.txt`` of a run, one record an epoch; a line that a crash has cut is none.

    Raises:
        InputError: the folder holds no such file, or another one of that name.
    """
    path = folder / "log.txt"
    try:
        lines = _read_lines(path)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); give a run's folder.") from None
    records = [record for _, record in _parse(lines)]
    if lines and not records:
        raise InputError(f"{path} is no log of a run; give a run's folder.")
    return records


def _read_lines(path: Path) -> list[str]:
    # What a crash left at the end may be any bytes.
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _parse(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """The lines that are whole, each with its record."""
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("epoch"), int):
                yield line, record


class RunLog:
    """``log.txt``, one JSON object an epoch, and the same numbers as TensorBoard events.

    ``log.txt`` holds no times: a run that was interrupted and resumed leaves the same file as
    one that was not. Lines of ``first_epoch``, which comes next, and of later ones are dropped.
    """

    def __init__(self, folder: RunFolder, *, first_epoch: int) -> None:
        self._folder = folder
        self._path = folder.path / "log.txt"
        # What a full disk has refused so far.
        self._lines: list[str] = []
        self._points: list[Mapping[str, float]] = []
        self._events: SummaryWriter | None = None
        run_on_main(lambda: _drop_epochs(self._path, first_epoch))

    def write(self, record: Mapping[str, float], *, is_last: bool = False) -> None:
        """Add an epoch, by its ``epoch``; every rank must call.

        What the disk refuses costs a warning, and is written together with the next epoch.

        Raises:
            InputError: the disk refuses the last line, or the folder has gone.
        """
        run_on_main(lambda: self._write(record, is_last))

    def _write(self, record: Mapping[str, float], is_last: bool) -> None:
        self._folder.check()
        self._lines.append(json.dumps(record) + "\n")
        self._points.append(record)
        try:
            _append(self._path, "".join(self._lines))
            self._lines.clear()
        except InputError as error:
            if is_last:
                raise
            _logger.warning("%s The run goes on, and tries again after the next epoch.", error)
            return
        try:
            self._send()
        except OSError as error:
            self._close()
            _logger.warning("TensorBoard's events cannot be written (%s).", error.strerror or error)

    def _send(self) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            first_epoch = int(self._points[0]["epoch"])
            self._events = SummaryWriter(str(self._folder.path), purge_step=first_epoch)
        for record in self._points:
            for name, value in record.items():
                if name != "epoch":
                    self._events.add_scalar(name, value, record["epoch"])
        self._events.flush()
        self._points.clear()

    def _close(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            with suppress(OSError):
                events.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()


def _append(path: Path, text: str) -> None:
    """All of a text, or nothing of it."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free space or get the right "
            "to write there."
        ) from error


def _drop_epochs(path: Path, first_epoch: int) -> None:
    """Keep the whole lines of earlier epochs only."""
    if not path.exists():
        return
    records = _parse(_read_lines(path))
    kept = [line + "\n" for line, record in records if record["epoch"] < first_epoch]
    write_text(path, "".join(kept))
