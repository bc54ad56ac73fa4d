"""The paper's tables, and our own, by one command each."""

from __future__ import annotations

from ecoformer.tools.tables.command import main

__all__ = ["main"]
