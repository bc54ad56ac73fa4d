"""The commands ``pvt.get_energy`` and ``twins.get_energy``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ecoformer.errors import EXIT_DONE, InputError, print_error
from ecoformer.files import write_text

if TYPE_CHECKING:
    from ecoformer.models.registry import ModelFamily


def run_get_energy(family: ModelFamily, argv: Sequence[str] | None = None) -> int:
    """Print what a model of a family costs. It needs no weights, and no fit.

    Returns:
        The process's exit code: 0 done, 2 bad input.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {family.name}.get_energy",
        usage="%(prog)s [--config FILE] [--model NAME] [--attn_type KIND] [--json [FILE]] ...",
        description=f"Count operations, energy and area of a {family.name} model for one image.",
        epilog=f"Flags that shape the model are those of python -m {family.name}.main: --config, "
        "--model, --attn_type, --input-size, --nbits, --anchor; its others change nothing here.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON; to stdout without FILE"
    )
    options, model_flags = parser.parse_known_args(argv)
    # Brings torch along, for which --help need not wait.
    from ecoformer.config import parse_config
    from ecoformer.tools.energy.description import count, to_json, to_text

    try:
        config = parse_config(model_flags, family)
        cost = count(config, family)
        if options.json != "-":
            print(to_text(config, cost))
        if options.json:
            _write(to_json(config, cost), options.json)
    except InputError as error:
        print_error(error)
        return error.exit_code
    return EXIT_DONE


def _write(text: str, file: str) -> None:
    if file == "-":
        print(text)
        return
    write_text(Path(file), text + "\n")
    print(f"\nwrote {file}")
