"""Set the paper's energy beside what is executed, what memory takes, and joules where told."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ecoformer.cost.executed import count_added_codes
from ecoformer.cost.joules import WARMUP_SECONDS, WINDOW_SECONDS, EnergyNotMeasurable, find_meter
from ecoformer.cost.prices import Prices
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import find_family
from ecoformer.ops.backends.native import library
from ecoformer.tools.table import Column, Value
from ecoformer.tools.tables.costs import (
    EXECUTED_NOTE,
    add_savings,
    cost_columns,
    describe_cost,
)

# Softmax over all tokens, which the other kinds are compared with.
_BASELINE = "msa"


def energy_columns(prices: Prices) -> tuple[Column, ...]:
    """Lay out what ``describe_energy`` tells."""
    memory = prices.memory
    return (
        Column("model", "model"),
        Column("input_size", "px", ".0f"),
        Column("name", "attention"),
        *cost_columns(),
        Column("realised", "of it realised %", ".0f"),
        Column("code_products", "through codes M", ".1f", 1e6),
        Column("code_additions", "here additions M", ".1f", 1e6),
        Column("traffic_bytes", "moved MB", ".1f", 1e6),
        Column("memory", f"{memory} mJ"),
        Column("saving_with_memory", f"with {memory} saved %"),
        Column("traffic_bytes_with_maps", "moved with maps MB", ".1f", 1e6),
        Column("memory_with_maps", f"with maps {memory} mJ"),
        Column("saving_with_maps", f"with maps, {memory} saved %"),
        Column("measured_j", "measured mJ", scale=1e-3),
        Column("measured_saving", "measured saved %", ".1f"),
        Column("measured_w", "measured W", ".1f"),
    )


def describe_energy(
    variants: Sequence[str], *, input_sizes: Sequence[int], batch_size: int, prices: Prices
) -> tuple[list[dict[str, Value]], list[str]]:
    """Compare the energy of all attention kinds of backbones.

    Args:
        input_sizes: image sides, pixels.
        batch_size: images that share one reading of the weights.

    Returns:
        Rows for ``energy_columns``, and notes. Each row is set against softmax attention of its
        model and size.

    Raises:
        InputError: no such backbone.
    """
    rows: list[dict[str, Value]] = []
    for variant in variants:
        kinds = find_family(variant).kinds(variant)
        for side in input_sizes:
            baseline: dict[str, Value] | None = None
            for kind in sorted(kinds, key=lambda kind: kind != _BASELINE):
                row: dict[str, Value] = {"model": variant, "input_size": side, "name": kind}
                row |= describe_cost(
                    variant, kind, input_size=side, prices=prices, batch_size=batch_size
                )
                _add_codes(row)
                _add_memory(row, prices)
                if baseline:
                    add_savings(row, baseline)
                    _add_wider_savings(row, baseline, prices)
                elif kind == _BASELINE:
                    baseline = row
                rows.append(row)
    limits = ""
    if not prices.is_papers:
        limits = (
            "; the paper's area is that of 45nm float32 alone. Whether accuracy survives another "
            "precision it does not tell, and codes are computed in float32 whatever the rest is"
        )
    return rows, [
        "One image; savings are against softmax attention of the same model and size.",
        EXECUTED_NOTE,
        f"A model by published figures, {prices}{limits}.",
        "Of it realised: the energy of the multiply-adds that are executed, each a multiplication "
        "and an addition, is saved in this share of the energy saved.",
        _describe_codes(),
        f"Moved: each layer reads its weights once a batch of {batch_size} and its inputs once, "
        f"and writes its outputs once, {prices.value_bytes} bytes a value, all in {prices.memory}. "
        "Softmax is fused, as in flash attention; with maps, its N x N maps are written and read, "
        "once each. What a cache catches is not told by this. Savings with memory are of "
        "arithmetic and memory together, at the memory's least and most.",
    ]


def _add_codes(row: dict[str, Value]) -> None:
    variant, side = str(row["model"]), int(_number(row, "input_size"))
    model = find_family(variant).create_empty(variant, str(row["name"]), input_size=side)
    products, additions = count_added_codes(model, side)
    if products:
        row["code_products"], row["code_additions"] = products, additions


def _describe_codes() -> str:
    if reason := library.load():
        return (
            "Products of codes with values are additions on paper, and this machine executes them "
            f"as multiply-adds: the C++ backend is not available here ({reason})."
        )
    return (
        "Through codes, here additions: of the multiply-adds executed, those that the C++ backend, "
        "which runs on this CPU, replaces by additions alone, and how many of them. A code's "
        "digits of up to 6 bits choose the sum that a row is added to, and the one that is read."
    )


def _add_memory(row: dict[str, Value], prices: Prices) -> None:
    """Price what is moved, for each memory and, in words, for the one where tensors lie."""
    for suffix in ("", "_with_maps"):
        num_bytes = float(row[f"traffic_bytes{suffix}"] or 0)
        for memory in prices.access_pj:
            key = f"{memory.lower().replace(' ', '_')}{suffix}"
            row[f"{key}_low_pj"], row[f"{key}_high_pj"] = prices.price_traffic(num_bytes, memory)
        row[f"memory{suffix}"] = _format_range(
            *(pj / 1e9 for pj in prices.price_traffic(num_bytes)), digits=2
        )


def _add_wider_savings(row: dict[str, Value], baseline: dict[str, Value], prices: Prices) -> None:
    """Add what of the arithmetic's saving is executed, and what is saved with memory in it."""
    saved_pj = _number(baseline, "energy_pj") - _number(row, "energy_pj")
    executed_pj = (prices.mul_pj + prices.add_pj) * (
        _number(baseline, "executed") - _number(row, "executed")
    )
    # Of a loss there is no share.
    if saved_pj > 0:
        row["realised"] = 100 * executed_pj / saved_pj
    for key, suffix in (("saving_with_memory", ""), ("saving_with_maps", "_with_maps")):
        savings = []
        for place in (0, 1):
            ours, theirs = (
                _number(r, "energy_pj")
                + prices.price_traffic(_number(r, f"traffic_bytes{suffix}"))[place]
                for r in (row, baseline)
            )
            savings.append(100 * (1 - ours / theirs))
        row[f"{key}_low"], row[f"{key}_high"] = savings
        row[key] = _format_range(*savings, digits=1)


def _format_range(first: float, last: float, *, digits: int) -> str:
    texts = dict.fromkeys((f"{first:.{digits}f}", f"{last:.{digits}f}"))
    return " to ".join(texts)


def _number(row: dict[str, Value], key: str) -> float:
    value = row[key]
    assert isinstance(value, (int, float))
    return value


def add_joules(
    rows: Sequence[dict[str, Value]], *, batch_size: int, device: torch.device, is_asked: bool
) -> str:
    """Measure the joules of each row of ``describe_energy`` where it is asked for and possible.

    It says beforehand how long it takes.

    Returns:
        A note: what was measured, or why it was not.
    """
    what = f"Measured energy ({device}, batches of {batch_size})"
    try:
        meter = find_meter(device)
    except EnergyNotMeasurable as error:
        return f"{what}: not available here: {error}."
    minutes = ((WARMUP_SECONDS + WINDOW_SECONDS) * len(rows) + WINDOW_SECONDS) / 60
    if not is_asked:
        return (
            f"{what}: not asked for; {meter.source} can tell it here, with --measure in "
            f"{minutes:.0f} minutes."
        )
    print(f"measuring {len(rows)} models, {minutes:.0f} minutes or somewhat longer", flush=True)
    idle = meter.measure_idle()
    baselines: dict[tuple[Value, Value], dict[str, Value]] = {}
    for row in rows:
        variant, side = str(row["model"]), int(_number(row, "input_size"))
        model = find_family(variant).create_model(variant, str(row["name"]), input_size=side)
        model = with_random_hash_functions(model).eval().to(device)
        images = torch.randn(batch_size, 3, side, side, device=device)
        with torch.inference_mode():
            energy = meter.measure(partial(model, images), device)
        row["measured_j"] = energy.joules_per_call / batch_size
        row["measured_w"], row["measured_s"] = energy.watts, energy.seconds
        row["idle_w"] = idle.watts
        # Softmax comes first of a model and size.
        baseline = baselines.setdefault((variant, side), row)
        if baseline is not row and baseline["name"] == _BASELINE:
            add_savings(row, baseline)
        print(f"{variant}/{row['name']}, {side} px: {energy.watts:.1f} W", flush=True)
    return (
        f"{what}: {meter.source}, in windows of at least {WINDOW_SECONDS:.0f} s after "
        f"{WARMUP_SECONDS:.0f} s to warm up. Idle, over as long a window, it takes "
        f"{idle.watts:.1f} W, which are in all figures, and so are others at work."
    )
