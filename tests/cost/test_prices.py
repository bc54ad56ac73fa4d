"""Energy by node and precision, by hand, and the paper's own to the last digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecoformer.cost import find_prices
from ecoformer.errors import InputError


@pytest.mark.parametrize(
    ("node", "precision", "energy_pj"),
    [
        ("45nm", "float32", 3700 + 1800),
        ("45nm", "float16", 1100 + 800),
        ("45nm", "int8", 200 + 60),
        ("7nm", "float32", 1310 + 760),
        ("7nm", "float16", 340 + 320),
        ("7nm", "bfloat16", 210 + 220),
        ("7nm", "int8", 70 + 14),
    ],
)
def test_a_thousand_multiplications_and_two_thousand_additions(
    node: str, precision: str, energy_pj: float
) -> None:
    prices = find_prices(node, precision)
    assert prices.price_operations(1000, 2000) == pytest.approx(energy_pj)


@pytest.mark.parametrize(
    ("node", "memory", "energy_pj"),
    [
        ("45nm", "8 KB SRAM", (80, 80)),
        ("45nm", "32 KB SRAM", (160, 160)),
        ("45nm", "1 MB SRAM", (800, 800)),
        ("45nm", None, (10_400, 20_800)),
        ("7nm", "8 KB SRAM", (60, 60)),
        ("7nm", "32 KB SRAM", (68, 68)),
        ("7nm", "1 MB SRAM", (112, 112)),
        ("7nm", "DDR4", (10_400, 10_400)),
        ("7nm", None, (2000, 3600)),
    ],
)
def test_eight_accesses_of_64_bits(
    node: str, memory: str | None, energy_pj: tuple[float, float]
) -> None:
    assert find_prices(node).price_traffic(64, memory) == energy_pj


def test_tensors_lie_in_main_memory() -> None:
    assert [find_prices(node).memory for node in ("45nm", "7nm")] == ["DRAM", "HBM2"]
    sizes = {
        p: find_prices("7nm", p).value_bytes for p in ("float32", "float16", "bfloat16", "int8")
    }
    assert sizes == {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def test_the_default_is_the_papers_to_the_last_digit(golden_dir: Path) -> None:
    prices = find_prices()
    assert prices.is_papers
    rows = json.loads((golden_dir / "cost.json").read_text())
    assert len(rows) == 12
    for row in rows.values():
        assert prices.price_operations(row["mul"], row["add"]) == row["energy_pj"]


@pytest.mark.parametrize(
    ("node", "precision"), [("45nm", "bfloat16"), ("5nm", "float32"), ("7nm", "float8")]
)
def test_what_was_not_published_is_not_made_up(node: str, precision: str) -> None:
    with pytest.raises(InputError, match=f"{precision} operations at {node}; there is: 45nm"):
        find_prices(node, precision)
