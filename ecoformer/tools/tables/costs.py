"""What models cost, as cells and columns of tables."""

from __future__ import annotations

from ecoformer.cost import Prices, count_cost
from ecoformer.cost.executed import count_executed
from ecoformer.cost.prices import PAPER_PRICES
from ecoformer.hash_config import HashConfig
from ecoformer.models.registry import find_family
from ecoformer.tools.table import Column, Row, Value

COST_NOTE = (
    "#Mul, #Add, energy and area are the paper's model of one image, at 45 nm unless another node "
    "is named. Hardware of today really saves what disappears, the N^2 products of softmax "
    "attention; it does not save what only turns from a multiplication into an addition, since it "
    "executes both as one multiply-add"
)
EXECUTED_NOTE = f"{COST_NOTE}. Those executed, in products and convolutions, stand beside."
_SAVINGS = {
    "energy_pj": "saving",
    "executed": "executed_saving",
    "measured_j": "measured_saving",
}


def cost_columns(*, is_small: bool = False) -> tuple[Column, ...]:
    """Lay out what ``describe_cost`` and ``add_savings`` tell.

    Operations are in 10^9 and energy in millijoules, or in a thousandth of that if small.
    """
    operations, joules, scale = ("M", "uJ", 1e6) if is_small else ("G", "mJ", 1e9)
    return (
        Column("parameters", "params M", scale=1e6),
        Column("mul", f"#Mul {operations}", scale=scale, published="published_mul_g"),
        Column("add", f"#Add {operations}", scale=scale, published="published_add_g"),
        Column("energy_pj", f"energy {joules}", scale=scale, published="published_energy_g_pj"),
        Column("saving", "energy saved %", ".1f"),
        Column("area_um2", "area m^2", scale=1e12),
        Column("executed", f"executed {operations}", scale=scale),
        Column("executed_saving", "executed saved %", ".1f"),
    )


def describe_cost(
    variant: str,
    attention: str,
    *,
    input_size: int,
    num_classes: int = 1000,
    hashing: HashConfig | None = None,
    is_executed_counted: bool = True,
    prices: Prices = PAPER_PRICES,
    batch_size: int = 1,
) -> dict[str, Value]:
    """Count what one image costs a model.

    Args:
        input_size: image side, pixels.
        is_executed_counted: tell what is executed too, which takes twice as long.
        batch_size: images that share one reading of the weights.

    Returns:
        Cells of a row: parameters, operations, energy in picojoules, area in square micrometres
        at the paper's prices, bytes to and from memory, and what is executed.

    Raises:
        InputError: no such backbone, or it has no such attention.
    """
    model = find_family(variant).create_empty(
        variant, attention, input_size=input_size, num_classes=num_classes, hashing=hashing
    )
    cost = count_cost(model, input_size)
    row: dict[str, Value] = {
        "parameters": cost.num_parameters,
        "mul": cost.mul,
        "add": cost.add,
        "energy_pj": prices.price_operations(cost.mul, cost.add),
        "area_um2": cost.area_um2 if prices.is_papers else None,
    }
    for with_maps, key in ((False, "traffic_bytes"), (True, "traffic_bytes_with_maps")):
        row[key] = cost.traffic_bytes(
            prices.value_bytes, batch_size=batch_size, with_maps=with_maps
        )
    if is_executed_counted:
        row["executed"] = count_executed(model, input_size)
    return row


def add_savings(row: dict[str, Value], baseline: Row) -> None:
    """Add what a row of ``describe_cost``, and of measured joules, saves against another, %."""
    for key, saving in _SAVINGS.items():
        ours, theirs = row.get(key), baseline.get(key)
        if isinstance(ours, (int, float)) and isinstance(theirs, (int, float)):
            row[saving] = 100 * (1 - ours / theirs)
