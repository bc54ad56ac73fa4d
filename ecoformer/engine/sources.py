"""Which checkpoint a run takes, and the file that it is in."""

from __future__ import annotations

import io
import logging
import os
import zipfile
from pathlib import Path

from ecoformer.checkpoint import resolve_source
from ecoformer.config import Config
from ecoformer.engine.state import BEST_CHECKPOINT, LAST_CHECKPOINT
from ecoformer.errors import InputError
from ecoformer.ranks import broadcast_object, download_on_main, run_on_main

# More than closes an archive without a comment, which is how checkpoints are.
_NUM_END_BYTES = 1024

_logger = logging.getLogger(__name__)


def find_source(config: Config) -> str | None:
    """Tell what ``--resume`` names, for ``auto`` the folder's checkpoint; every rank must ask.

    Raises:
        InputError: the folder's checkpoint is there and cannot be read.
    """
    if config.run.resume != "auto":
        return config.run.resume
    found: list[str | None] = [None]
    run_on_main(lambda: found.append(_find_in_folder(config.run.output_dir)))
    return broadcast_object(found[-1])


def fetch(source: str) -> Path:
    """Find the file of a path, URL or zoo name; every rank must ask, and one downloads for all.

    Raises:
        InputError: there is no such source, or what came is not what was published.
    """
    paths: list[Path] = []
    download_on_main(lambda: paths.append(resolve_source(source)))
    if paths:
        return paths[0]
    # What there is to say of it, rank 0 has said.
    logging.disable(logging.WARNING)
    try:
        return resolve_source(source)
    finally:
        logging.disable(logging.NOTSET)


def _find_in_folder(folder: str) -> str | None:
    """The last one; the best one where the last is missing or was cut short."""
    paths = [os.path.join(folder, name) for name in (LAST_CHECKPOINT, BEST_CHECKPOINT)]
    paths = [path for path in paths if os.path.exists(path)]
    chosen = next(filter(_is_archive, paths), None)
    if chosen is not None and chosen != paths[0]:
        _logger.warning("%s is damaged, so %s takes its place", paths[0], chosen)
    return chosen or next(iter(paths), None)


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
