"""Pictures of runs, tables, costs and codes."""

from __future__ import annotations

from ecoformer.tools.plots.command import main

__all__ = ["main"]
