"""Look at all that a run needs, before it needs it."""

from __future__ import annotations

from ecoformer.tools.doctor.command import main

__all__ = ["main"]
