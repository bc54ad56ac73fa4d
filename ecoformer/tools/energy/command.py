"""The command ``ecoformer cost``, which ``pvt.get_energy`` and ``twins.get_energy`` are, too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ecoformer.config import parse_config
from ecoformer.config.arguments import ArgumentParser
from ecoformer.errors import EXIT_DONE, InputError, print_error
from ecoformer.files import write_text
from ecoformer.models.registry import ModelFamily, find_family
from ecoformer.tools.energy.flags import add_silicon_flags


def run_get_energy(argv: Sequence[str] | None = None, family: ModelFamily | None = None) -> int:
    """Print what a model costs. It needs no weights, and no fit.

    Args:
        family: where models come from; the one that ``--model`` belongs to where None.

    Returns:
        The process's exit code: 0 done, 2 bad input.
    """
    program = f"python -m {family.name}.get_energy" if family else "ecoformer cost"
    train = f"python -m {family.name}.main" if family else "ecoformer train"
    parser = ArgumentParser(
        prog=program,
        usage="%(prog)s [--config FILE] [--model NAME] [--attn_type KIND] [--json [FILE]] "
        "[--node NODE] [--precision PRECISION] ...",
        description="Count operations, energy, area and memory traffic of a model for one image.",
        epilog=f"Flags that shape the model are those of {train}: --config, --model, --attn_type, "
        "--input-size, --nbits, --anchor, and --task with --short-side and --long-side; its others "
        "change nothing here.",
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON; to stdout without FILE"
    )
    add_silicon_flags(parser)
    options, model_flags = parser.parse_known_args(argv)
    try:
        config = parse_config(model_flags, family)
        # Brings torch along, for which a wrong flag need not wait.
        from ecoformer.cost.prices import find_prices
        from ecoformer.tools.energy.description import count, to_json, to_text

        prices = find_prices(options.node, options.precision)
        cost = count(config, family or find_family(config.model.model))
        if options.json != "-":
            print(to_text(config, cost, prices))
        if options.json:
            _write(to_json(config, cost, prices), options.json)
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
