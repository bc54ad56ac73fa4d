"""The command ``ecoformer report``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ecoformer.config.arguments import ArgumentParser
from ecoformer.errors import EXIT_DONE, InputError, print_error
from ecoformer.files import write_text

_MAX_BYTES = 1_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Write one page about runs; returns the process's exit code, 0 done or 2 bad input."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser(
        prog="ecoformer report",
        description="Write runs as one offline page: table, curves, energy, cost, codes.",
        epilog="Runs of equal settings are taken together, by seed. Codes need a run with softmax "
        "and one with EcoFormer attention.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs", "report.html"),
        metavar="FILE.html",
        help="(%(default)s)",
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        metavar="NUMBER",
        help="validation images whose codes are shown (three, spread evenly)",
    )
    options = parser.parse_args(words)
    try:
        page = _write_page(options.runs, options.images, f"ecoformer report {shlex.join(words)}")
        size = len(page.encode())
        if size >= _MAX_BYTES:
            raise InputError(
                f"the page would have {size / 1e6:.1f} MB, and less than 1 MB travels well; give "
                "fewer --images or runs."
            )
        write_text(options.output, page)
    except InputError as error:
        print_error(error)
        return error.exit_code
    print(f"wrote {options.output}, {size / 1e3:.0f} KB")
    return EXIT_DONE


def _write_page(runs: Sequence[Path], images: Sequence[int] | None, command: str) -> str:
    # These bring torch and matplotlib along, which --help need not wait for.
    import torch

    from ecoformer.tools.measure import describe_environment
    from ecoformer.tools.report.content import write_sections
    from ecoformer.tools.report.page import Section, format_page

    environment = describe_environment(command, torch.device("cpu"))
    made = [f"{name}: {fact}" for name, fact in environment.items() if name != "load"]
    sections = [*write_sections(runs, images), Section("How this page was made", notes=made)]
    return format_page("EcoFormer, a report of runs", sections)
