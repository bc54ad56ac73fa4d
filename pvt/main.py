"""Train, evaluate or time a PVTv2: ``python -m pvt.main --help``."""

from __future__ import annotations

from collections.abc import Sequence

from ecoformer.engine.command import run_command
from pvt import FAMILY


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the process's exit code."""
    return run_command(argv, FAMILY)


if __name__ == "__main__":
    raise SystemExit(main())
