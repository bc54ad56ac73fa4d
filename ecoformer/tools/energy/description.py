"""Describe what a model costs, for people and for programs."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict

from ecoformer.attention import attention_class, attention_kinds
from ecoformer.config import Config
from ecoformer.cost.count import (
    ADD_AREA_UM2,
    ADD_ENERGY_PJ,
    MUL_AREA_UM2,
    MUL_ENERGY_PJ,
    Cost,
    count_cost,
    price_energy,
)
from ecoformer.models.registry import ModelFamily
from ecoformer.tools.table import Column, Row, format_markdown

_COLUMNS = (
    Column("kind", "layers"),
    Column("mul", "mul M", ",.2f", 1e6),
    Column("add", "add M", ",.2f", 1e6),
    Column("energy_pj", "energy uJ", ",.2f", 1e6),
    Column("share", "share %"),
)
_SCOPE = (
    "Counted are the float32 multiplications and additions of one image, priced in 45 nm silicon: "
    f"{MUL_ENERGY_PJ} pJ and {ADD_ENERGY_PJ} pJ for energy, {MUL_AREA_UM2:,} and "
    f"{ADD_AREA_UM2:,} um^2 for a unit of its own each. GELU, ReLU, softmax, pooling, residual "
    "sums and traffic to memory count nothing."
)


def count(config: Config, family: ModelFamily) -> Cost:
    """Count the cost of the model of a run.

    Raises:
        InputError: the family has no such model, or it takes no images of that size.
    """
    settings = config.model
    model = family.create_empty(settings.model, settings.attn_type, hashing=config.hashing)
    return count_cost(model, settings.input_size)


def to_text(config: Config, cost: Cost) -> str:
    """Write a table of the kinds of layers, and the totals."""
    rows: list[Row] = []
    for kind, (mul, add) in [*cost.by_kind().items(), ("total", (cost.mul, cost.add))]:
        energy_pj = price_energy(mul, add)
        share = 100 * energy_pj / cost.energy_pj
        rows.append({"kind": kind, "mul": mul, "add": add, "energy_pj": energy_pj, "share": share})
    model = config.model
    height, width = cost.input_size
    return "\n".join(
        [
            f"{model.model}, {model.attn_type} attention, one image of {height} x {width} pixels",
            "",
            format_markdown(_COLUMNS, rows),
            "",
            f"multiplications  {cost.mul / 1e9:.2f} G",
            f"additions        {cost.add / 1e9:.2f} G",
            f"energy           {cost.energy_pj / 1e9:.2f} G pJ = {cost.energy_pj / 1e9:.2f} mJ",
            f"area             {cost.area_um2 / 1e12:.2f} m^2",
            f"parameters       {cost.num_parameters / 1e6:.2f} M",
            "",
            *(textwrap.fill(note, 100) for note in _list_notes(cost)),
        ]
    )


def to_json(config: Config, cost: Cost) -> str:
    """Write everything: totals, kinds of layers, and each layer."""
    model = config.model
    content = {
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
        "notes": _list_notes(cost),
    }
    return json.dumps(content, indent=1)


def _list_notes(cost: Cost) -> list[str]:
    classes = map(attention_class, attention_kinds())
    notes = [cls.cost_note for cls in classes if f"{cls.kind} attention" in cost.by_kind()]
    return [_SCOPE, *filter(None, notes)]
