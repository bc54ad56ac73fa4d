"""The command ``ecoformer doctor``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ecoformer.config.arguments import ArgumentParser
from ecoformer.config.schema import field_types
from ecoformer.errors import EXIT_BAD_INPUT, EXIT_DONE

if TYPE_CHECKING:
    from ecoformer.tools.doctor.checks import Finding


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks and print what they find; returns exit code 2 where there is a problem."""
    options = _parse(argv)
    # Brings torch along, which --help need not wait for.
    from ecoformer.tools.doctor.checks import CHECKS, run_check

    seen: set[Finding] = set()
    for check in CHECKS:
        for finding in run_check(check, options):
            # A missing folder or device is found more than once.
            if finding not in seen:
                print(f"{finding.level:<8} {finding.message}", flush=True)
            seen.add(finding)
    num_problems = sum(finding.level == "problem" for finding in seen)
    print(f"\n{num_problems or 'no'} problem{'s' * (num_problems != 1)}")
    return EXIT_BAD_INPUT if num_problems else EXIT_DONE


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="ecoformer doctor",
        description="Check environment, GPU, data, output folder and one small training step.",
    )
    flag = parser.add_argument
    flag("--data-path", metavar="DIR", help="data folder of the run")
    flag("--data-set", choices=get_args(field_types()["data_set"]), default="IMNET")
    flag("--quick", action="store_true", help="decode 1,000 images a split")
    flag("--output-dir", metavar="DIR", type=Path, default=Path("runs"))
    flag("--device", help="cuda, cuda:1, cpu ...; CUDA where there is one")
    return parser.parse_args(argv)
