"""Summarise results over seeds: means, 95 % intervals, differences seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ecoformer.tools.table import Column, Row, Value

SEEDS_NOTE = (
    "A result is the mean over seeds, std their standard deviation; vs first row is the mean of "
    "the differences from the first row, seed by seed. +- 95 % is half the width of Student's t "
    "interval of such a mean; a difference below its own is not significant over these seeds."
)


def seed_columns(title: str = "top-1 %", key: str = "top1") -> tuple[Column, ...]:
    """Lay out what ``describe_seeds`` tells under the same key."""
    return (
        Column(key, title),
        Column(f"{key}_ci95", "+- 95 %"),
        Column(f"{key}_std", "std"),
        Column("difference", "vs first row"),
        Column("difference_ci95", "vs first +- 95 %"),
        Column("num_seeds", "seeds", ".0f"),
    )


def describe_seeds(
    results: Mapping[int, float], baseline: Mapping[int, float] | None = None, *, key: str = "top1"
) -> dict[str, Value]:
    """Summarise one result a seed, and its difference from another row's of the same seed.

    Args:
        results: seed to result; at least one.
        baseline: the same of the row to compare with; seeds of one side alone are left out.

    Returns:
        Cells of a row: mean ``key`` and ``num_seeds``; of two seeds or more ``key_std`` and
        ``key_ci95``, half the 95 % t interval of the mean; ``difference`` and
        ``difference_ci95`` likewise, of the paired differences.
    """
    from scipy import stats  # most of a second to import

    def half_interval(values: Sequence[float]) -> float:
        return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))

    values = list(results.values())
    row: dict[str, Value] = {key: statistics.mean(values), "num_seeds": len(values)}
    if len(values) > 1:
        row[f"{key}_std"] = statistics.stdev(values)
        row[f"{key}_ci95"] = half_interval(values)
    baseline = baseline or {}
    differences = [results[seed] - baseline[seed] for seed in results if seed in baseline]
    if differences:
        row["difference"] = statistics.mean(differences)
    if len(differences) > 1:
        row["difference_ci95"] = half_interval(differences)
    return row


def describe_curves(
    curves: Mapping[int, Sequence[float]],
    baseline: Mapping[int, Sequence[float]],
    *,
    key: str = "top1",
) -> dict[str, Value]:
    """Summarise what was measured after the last epoch by ``describe_seeds``, and list it all.

    Args:
        curves: seed to what was measured after each epoch, percent.
        baseline: the same of the row to compare with; empty for that row itself.
    """
    row = describe_seeds(_take_last(curves), _take_last(baseline), key=key)
    for seed, curve in curves.items():
        row[f"{key}_by_epoch_seed{seed}"] = " ".join(f"{value:.2f}" for value in curve)
    return row


def seed_notes(rows: Sequence[Row], *, key: str = "top1") -> list[str]:
    """Explain the columns of ``seed_columns``, where rows have several seeds."""
    return [SEEDS_NOTE] if any(f"{key}_std" in row for row in rows) else []


def _take_last(curves: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {seed: curve[-1] for seed, curve in curves.items()}
