"""What a model costs, layer by layer."""

from __future__ import annotations

from ecoformer.tools.energy.command import run_get_energy

__all__ = ["run_get_energy"]
