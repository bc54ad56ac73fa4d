"""The published models, and what models cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ecoformer.checkpoint.zoo import ZOO, ZooEntry
from ecoformer.cost import count_cost
from ecoformer.cost.executed import count_executed
from ecoformer.engine.throughput import measure_throughput
from ecoformer.errors import InputError, suggest
from ecoformer.hash_config import HashConfig
from ecoformer.models.registry import find_family
from ecoformer.tools.tables.report import Column, Row, Value

COST_NOTE = (
    "#Mul, #Add, energy (45 nm) and area are the paper's model of one image. Hardware of today "
    "really saves what disappears, the N^2 products of softmax attention; it does not save what "
    "only turns from a multiplication into an addition, since it executes both as one "
    "multiply-add"
)
EXECUTED_NOTE = f"{COST_NOTE}. Those executed, in products and convolutions, stand beside."


def cost_columns(*, is_small: bool = False) -> tuple[Column, ...]:
    """Lay out what ``describe_cost`` and ``add_savings`` tell.

    Args:
        is_small: count operations in millions and energy in microjoules, not a thousand times
            that.

    Returns:
        Columns, in units to match.
    """
    operations, joules, scale = ("M", "uJ", 1e6) if is_small else ("G", "mJ", 1e9)
    return (
        Column("parameters", "params M", scale=1e6),
        Column("mul", f"#Mul {operations}", scale=scale, published="published_mul_g"),
        Column("add", f"#Add {operations}", scale=scale, published="published_add_g"),
        Column("energy_pj", f"energy {joules}", scale=scale, published="published_energy_g_pj"),
        Column("saving", "energy saved %", digits=1),
        Column("area_um2", "area m^2", scale=1e12),
        Column("executed", f"executed {operations}", scale=scale),
        Column("executed_saving", "executed saved %", digits=1),
    )


MAIN_COLUMNS = (
    Column("name", "model"),
    *cost_columns(),
    Column("top1", "top-1 %", published="published_top1"),
    Column("images_per_s", "images/s", digits=1),
    Column("published_images_per_s", "images/s, RTX 3090", digits=0),
)
MAIN_NOTES = (
    "Published values stand in brackets, after != where ours differs in the digits printed. "
    "The 6.75 G additions published for PVTv2-B3 are a slip: the released counter gives 6.72 G, "
    "as here, and the published energy agrees with that.",
    "Energy is saved against softmax attention over all tokens, the row above.",
    f"{COST_NOTE}: python -m ecoformer.tools.tables energy counts those.",
)
_BASELINE = "msa"
_SAVINGS = {
    "energy_pj": "saving",
    "executed": "executed_saving",
    "measured_j": "measured_saving",
}


def describe_cost(
    variant: str,
    attention: str,
    *,
    input_size: int,
    num_classes: int = 1000,
    hashing: HashConfig | None = None,
    is_executed_counted: bool = True,
) -> dict[str, Value]:
    """Count what one image costs a model.

    Args:
        variant: the backbone.
        attention: its kind of attention.
        input_size: image side, pixels.
        num_classes: outputs.
        hashing: of EcoFormer.
        is_executed_counted: tell what is executed too, which takes twice as long.

    Returns:
        Cells of a row: parameters, operations, energy in picojoules, area in square micrometres,
        and what is executed.

    Raises:
        InputError: no such backbone, or it has no such attention.
    """
    # Without data: weights would only be drawn to be thrown away.
    with torch.device("meta"):
        model = find_family(variant).create_model(
            variant, attention, num_classes=num_classes, hashing=hashing
        )
    cost = count_cost(model, input_size)
    row: dict[str, Value] = {
        "parameters": cost.num_parameters,
        "mul": cost.mul,
        "add": cost.add,
        "energy_pj": cost.energy_pj,
        "area_um2": cost.area_um2,
    }
    if is_executed_counted:
        row["executed"] = count_executed(model, input_size)
    return row


def add_savings(row: dict[str, Value], baseline: Row) -> None:
    """Add what a row saves against another one, percent.

    Args:
        row: with the cells of ``describe_cost``, and joules if they were measured; changed in
            place.
        baseline: what it is compared with.
    """
    for key, saving in _SAVINGS.items():
        ours, theirs = row.get(key), baseline.get(key)
        if isinstance(ours, (int, float)) and isinstance(theirs, (int, float)):
            row[saving] = 100 * (1 - ours / theirs)


def describe_models() -> list[dict[str, Value]]:
    """List the published models with all that needs neither data nor weights.

    Returns:
        Rows of the main table, softmax and EcoFormer attention of each model in turn.
    """
    rows: list[dict[str, Value]] = []
    for zoo_name, entry in ZOO.items():
        for attention in (_BASELINE, "ecoformer"):
            row: dict[str, Value] = {"name": f"{entry.model}/{attention}"}
            row |= describe_cost(
                entry.model, attention, input_size=entry.input_size, is_executed_counted=False
            )
            if attention == "ecoformer":
                add_savings(row, rows[-1])
                row |= _describe_published(zoo_name, entry)
            rows.append(row)
    return rows


def _describe_published(zoo_name: str, entry: ZooEntry) -> dict[str, Value]:
    return {
        "zoo": zoo_name,
        "published_mul_g": entry.mul_g,
        "published_add_g": entry.add_g,
        "published_energy_g_pj": entry.energy_g_pj,
        "published_top1": entry.top1,
        "published_images_per_s": entry.throughput_img_s,
    }


def choose_weights(named: Sequence[str]) -> dict[str, str]:
    """Weights of the rows that are to be evaluated.

    Args:
        named: ``"MODEL/ATTENTION=SOURCE"`` each; the zoo's where there is none.

    Returns:
        Name of a row to its weights: a path, URL or zoo name.

    Raises:
        InputError: one is not of that form, or no row has that name.
    """
    if not named:
        return {f"{entry.model}/ecoformer": zoo_name for zoo_name, entry in ZOO.items()}
    rows = [f"{entry.model}/{kind}" for entry in ZOO.values() for kind in (_BASELINE, "ecoformer")]
    weights = {}
    for text in named:
        row, _, source = text.partition("=")
        if row not in rows or not source:
            raise InputError(
                f"--weights {text}: expected MODEL/ATTENTION=SOURCE{suggest(row, rows)}"
                f" There are: {', '.join(rows)}."
            )
        weights[row] = source
    return weights


def add_throughput(
    rows: Sequence[dict[str, Value]], *, batch_size: int, device: torch.device
) -> None:
    """Time each row's model here.

    Args:
        rows: from ``describe_models``; changed in place.
        batch_size: images a batch.
        device: where the models run.
    """
    sizes = {entry.model: entry.input_size for entry in ZOO.values()}
    for row in rows:
        variant, attention = str(row["name"]).split("/")
        model = find_family(variant).create_model(variant, attention)
        images = torch.randn(batch_size, 3, sizes[variant], sizes[variant])
        result = measure_throughput(
            model.to(device), [images], batch_size=batch_size, protocol="median", samples="images"
        )
        print(f"{row['name']}: {result}", flush=True)
        row["images_per_s"] = result.median
