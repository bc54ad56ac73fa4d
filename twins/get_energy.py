"""Operations, energy and area of a Twins: ``python -m twins.get_energy --help``."""

from __future__ import annotations

from collections.abc import Sequence

from ecoformer.tools.energy.command import run_get_energy
from twins import FAMILY


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return run_get_energy(argv, FAMILY)


if __name__ == "__main__":
    raise SystemExit(main())
