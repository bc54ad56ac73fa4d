"""Where weights come from: a path, a URL or the name of a released checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from ecoformer.errors import InputError


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """Find the local file that a source stands for.

    Args:
        source: a path.

    Raises:
        InputError: there is no such file.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    return path
