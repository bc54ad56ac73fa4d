"""Which checkpoint a run takes, and the file that it is in."""

from __future__ import annotations

import io
import logging
import os
import socket
import zipfile
from pathlib import Path

from ecoformer.checkpoint import resolve_source
from ecoformer.config import Config
from ecoformer.engine.state import BEST_CHECKPOINT, LAST_CHECKPOINT
from ecoformer.errors import InputError
from ecoformer.ranks import AgreedError, download_on_main, is_main, rank, run_on_all

# More than closes an archive without a comment, which is how checkpoints are.
_NUM_END_BYTES = 1024

# In the order of choice; the last two are what the released Twins scripts wrote.
_NAMES = (LAST_CHECKPOINT, BEST_CHECKPOINT, "checkpoint.pth", "checkpoint_best.pth")

_logger = logging.getLogger(__name__)


def find_source(config: Config) -> str | None:
    """Tell what ``--resume`` names, for ``auto`` the folder's checkpoint; every rank must ask.

    Raises:
        InputError: the folder's checkpoint is there and cannot be read, or only some ranks see it.
    """
    if config.run.resume != "auto":
        return config.run.resume
    folder = config.run.output_dir
    found = run_on_all(lambda: (_find_in_folder(folder), socket.gethostname()))
    name, first_host = found[0]
    for number, (other, host) in enumerate(found):
        if other != name:
            raise AgreedError(
                f"{folder} holds {name or 'no checkpoint'} on rank 0 ({first_host}) and "
                f"{other or 'no checkpoint'} on rank {number} ({host}); put --output-dir on a disk "
                "that all hosts share, or name one file with --resume."
            )
    return os.path.join(folder, name) if name else None


def fetch(source: str) -> Path:
    """Find the file of a path, URL or zoo name; every rank must ask, and one downloads for all.

    Raises:
        InputError: there is no such source, or what came is not what was published.
    """
    paths: list[Path] = []
    download_on_main(lambda: paths.append(resolve_source(source)))

    def find() -> Path:
        if paths:
            return paths[0]
        # What there is to say of it, rank 0 has said.
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            return resolve_source(source)
        finally:
            logging.disable(before)

    return run_on_all(find)[rank()]


def _find_in_folder(folder: str) -> str | None:
    """Its name: the last one, or where it is missing or was cut short the best; a released one."""
    paths = [os.path.join(folder, name) for name in _NAMES]
    paths = [path for path in paths if os.path.exists(path)]
    chosen = next(filter(_is_archive, paths), None)
    if chosen is not None and chosen != paths[0] and is_main():
        _logger.warning("%s is damaged, so %s takes its place", paths[0], chosen)
    source = chosen or next(iter(paths), None)
    return source and os.path.basename(source)


def _is_archive(path: str) -> bool:
    """Whether a file has the end of an archive, without which it was cut short."""
    try:
        with open(path, "rb") as file:
            file.seek(-min(_NUM_END_BYTES, os.path.getsize(path)), os.SEEK_END)
            end = file.read()
    # The library would call damaged what cannot be read, and the run would replace it.
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); get the right to read it, or "
            "start anew with --resume none."
        ) from error
    return zipfile.is_zipfile(io.BytesIO(end))
