"""Set the paper's energy beside what is executed, and beside joules where they are told."""

from __future__ import annotations

import torch

from ecoformer.cost.joules import EnergyMeter, EnergyNotMeasurable, find_meter
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import find_family
from ecoformer.tools.table import Column, Value
from ecoformer.tools.tables.costs import (
    EXECUTED_NOTE,
    add_savings,
    cost_columns,
    describe_cost,
)

ENERGY_COLUMNS = (
    Column("name", "attention"),
    *cost_columns(),
    Column("measured_j", "measured mJ", scale=1e-3),
    Column("measured_saving", "measured saved %", ".1f"),
)


def describe_energy(
    variant: str, *, input_size: int, batch_size: int, device: torch.device
) -> tuple[list[dict[str, Value]], list[str]]:
    """Compare the energy of all attention kinds of a backbone.

    Args:
        input_size: image side, pixels.
        batch_size: images a call, where joules are measured.

    Returns:
        Rows for ``ENERGY_COLUMNS``, and notes.
    """
    family = find_family(variant)
    kinds = family.kinds(variant)
    meter: EnergyMeter | None = None
    try:
        meter = find_meter(device)
        source = f"{meter.source}; idle power, and others at work, are in it"
    except EnergyNotMeasurable as error:
        source = f"not available here: {error}"
    rows: list[dict[str, Value]] = []
    # Softmax over all tokens first: the others are compared with it.
    for kind in sorted(kinds, key=lambda kind: kind != "msa"):
        row: dict[str, Value] = {"name": kind}
        row |= describe_cost(variant, kind, input_size=input_size)
        if meter is not None:
            model = with_random_hash_functions(family.create_model(variant, kind)).eval()
            row["measured_j"] = _measure(meter, model.to(device), input_size, batch_size, device)
        if rows:
            add_savings(row, rows[0])
        rows.append(row)
    return rows, [
        f"{variant}, one image of {input_size} px; savings are against the first row.",
        EXECUTED_NOTE,
        f"Measured energy ({device}, batches of {batch_size}): {source}.",
    ]


@torch.inference_mode()
def _measure(
    meter: EnergyMeter,
    model: torch.nn.Module,
    input_size: int,
    batch_size: int,
    device: torch.device,
) -> float:
    images = torch.randn(batch_size, 3, input_size, input_size, device=device)
    return meter.measure(lambda: model(images), device) / batch_size
