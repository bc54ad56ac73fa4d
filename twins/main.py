"""Train, evaluate or time a Twins: ``python -m twins.main --help``."""

from __future__ import annotations

from collections.abc import Sequence

from ecoformer.engine.main import run_main
from twins import FAMILY


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; ``sys.argv`` if not given.

    Returns:
        The process's exit code.
    """
    return run_main(FAMILY, argv)


if __name__ == "__main__":
    raise SystemExit(main())
