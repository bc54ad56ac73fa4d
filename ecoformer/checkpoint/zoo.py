"""Where weights come from: a path, a URL or the name of a released checkpoint."""

from __future__ import annotations

import os
from pathlib import Path


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """Find the local file that a source stands for.

    Args:
        source: a path.

    Returns:
        A path, at which there need not be a file.
    """
    return Path(source).expanduser()
