"""What a model costs, as a table and as JSON: the command behind ``pvt.get_energy``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ecoformer.attention import attention_class, attention_kinds
from ecoformer.config import Config, parse_config
from ecoformer.cost.count import (
    ADD_AREA_UM2,
    ADD_ENERGY_PJ,
    MUL_AREA_UM2,
    MUL_ENERGY_PJ,
    Cost,
    count_cost,
    price_energy,
)
from ecoformer.errors import EXIT_DONE, InputError, print_error
from ecoformer.files import write_text
from ecoformer.models.registry import ModelFamily

_SCOPE = f"""\
Counted are the float32 multiplications and additions of one image, priced in 45 nm silicon:
{MUL_ENERGY_PJ} pJ and {ADD_ENERGY_PJ} pJ for energy, {MUL_AREA_UM2:,} and {ADD_AREA_UM2:,} um^2
for a unit of its own each. GELU, ReLU, softmax, pooling, residual sums and traffic to memory
count nothing."""


def run_get_energy(family: ModelFamily, argv: Sequence[str] | None = None) -> int:
    """Print what a model of a family costs. It needs no weights, and no fit.

    Args:
        family: the backbone.
        argv: the words after the program's name; ``sys.argv`` if not given.

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
    try:
        config = parse_config(model_flags, family)
        cost = _count(family, config)
        if options.json != "-":
            print(_format_table(config, cost))
        if options.json:
            _write(json.dumps(_to_dict(config, cost), indent=1), options.json)
    except InputError as error:
        print_error(error)
        return error.exit_code
    return EXIT_DONE


def _count(family: ModelFamily, config: Config) -> Cost:
    settings = config.model
    # Without data: weights would only be drawn to be thrown away.
    with torch.device("meta"):
        model = family.create_model(settings.model, settings.attn_type, hashing=config.hashing)
    return count_cost(model, settings.input_size)


def _format_table(config: Config, cost: Cost) -> str:
    model = config.model
    height, width = cost.input_size
    lines = [
        f"{model.model}, {model.attn_type} attention, one image of {height} x {width} pixels",
        "",
        _format_row("layers", "mul (M)", "add (M)", "energy (uJ)", "share (%)"),
    ]
    for kind, (mul, add) in [*cost.by_kind().items(), ("total", (cost.mul, cost.add))]:
        energy_pj = price_energy(mul, add)
        numbers = (mul / 1e6, add / 1e6, energy_pj / 1e6, 100 * energy_pj / cost.energy_pj)
        lines.append(_format_row(kind, *(f"{number:,.2f}" for number in numbers)))
    lines += [
        "",
        f"multiplications  {cost.mul / 1e9:.2f} G",
        f"additions        {cost.add / 1e9:.2f} G",
        f"energy           {cost.energy_pj / 1e9:.2f} G pJ = {cost.energy_pj / 1e9:.2f} mJ",
        f"area             {cost.area_um2 / 1e12:.2f} m^2",
        f"parameters       {cost.num_parameters / 1e6:.2f} M",
        "",
        _SCOPE,
        *_find_notes(cost),
    ]
    return "\n".join(lines)


def _format_row(name: str, *cells: str) -> str:
    return f"{name:<22}" + "".join(f"{cell:>13}" for cell in cells)


def _find_notes(cost: Cost) -> list[str]:
    classes = map(attention_class, attention_kinds())
    counted = [cls for cls in classes if f"{cls.kind} attention" in cost.by_kind()]
    return [cls.cost_note for cls in counted if cls.cost_note]


def _to_dict(config: Config, cost: Cost) -> dict[str, Any]:
    model = config.model
    return {
        "model": model.model,
        "attention": model.attn_type,
        "hashing": asdict(config.hashing) if model.attn_type == "ecoformer" else None,
        "input_size": cost.input_size,
        "mul": cost.mul,
        "add": cost.add,
        "energy_pj": cost.energy_pj,
        "area_um2": cost.area_um2,
        "parameters": cost.num_parameters,
        "kinds": {
            kind: {"mul": mul, "add": add, "energy_pj": price_energy(mul, add)}
            for kind, (mul, add) in cost.by_kind().items()
        },
        "layers": [asdict(layer) for layer in cost.layers],
        "notes": [" ".join(_SCOPE.split()), *_find_notes(cost)],
    }


def _write(text: str, file: str) -> None:
    if file == "-":
        print(text)
        return
    write_text(Path(file), text + "\n")
    print(f"\nwrote {file}")
