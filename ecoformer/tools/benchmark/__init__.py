"""What attention, fit, models and training steps cost in time and memory, beside their peers."""

from __future__ import annotations

from ecoformer.tools.benchmark.command import main

__all__ = ["main"]
