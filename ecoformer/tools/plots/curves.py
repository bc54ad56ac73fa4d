"""Draw training, accuracy against energy, and cost against resolution."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from ecoformer.engine.logs import read_log
from ecoformer.errors import InputError
from ecoformer.models.registry import find_family
from ecoformer.tools.figures import make_figure
from ecoformer.tools.table import Row
from ecoformer.tools.tables.costs import describe_cost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Key in a log to a name on an axis; a task of somebody's own is measured by its key.
_MEASURES = {"test_acc1": "top-1 %", "test_AP": "AP %", "test_mIoU": "mIoU %"}


def find_measure(runs: Sequence[Path]) -> tuple[str, str]:
    """Find what runs are measured by: its key in their logs, and what pictures call it.

    It is the first that was measured, a loss aside: ``Metrics`` begins with it.

    Raises:
        InputError: a folder holds no log, or no epoch in it, or runs are of different tasks.
    """
    found: dict[str, Path] = {}
    for run in runs:
        records = read_log(run)
        if not records:
            raise InputError(f"{run} has finished no epoch yet; give a run that has.")
        keys = (key for key in records[0] if key.startswith("test_") and key != "test_loss")
        key = next(keys, None)
        if key is None:
            raise InputError(f"{run} was never measured: its log has no test_acc1 or the like.")
        found.setdefault(key, run)
    (key, run), *others = found.items()
    for other, another in others:
        raise InputError(
            f"{run} is measured by {key}, and {another} by {other}; give runs of one task."
        )
    return key, _MEASURES.get(key, key)


def draw_curves(runs: Sequence[Path]) -> Figure:
    """Draw the loss, and what runs are measured by, over epochs on two axes, a line a run.

    Raises:
        InputError: see ``find_measure``.
    """
    measure, title = find_measure(runs)
    figure, (losses, measures) = make_figure(2)
    is_ambiguous = len({run.resolve().name for run in runs}) < len(runs)
    for run in runs:
        records = read_log(run)
        epochs = [record["epoch"] + 1 for record in records]
        # Seeds of a table's runs lie in folders above them.
        label = "/".join(run.resolve().parts[-2:]) if is_ambiguous else run.resolve().name
        for axes, key in ((losses, "train_loss"), (measures, measure)):
            axes.plot(epochs, [record[key] for record in records], marker=".", label=label)
    losses.set(xlabel="epoch", ylabel="training loss")
    measures.set(xlabel="epoch", ylabel=title)
    for axes in (losses, measures):
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
    measures.legend(fontsize="small")
    return figure


def draw_tradeoff(tables: Sequence[Path]) -> Figure:
    """Draw accuracy against energy, a point a row, with the 95 % interval over its seeds.

    Args:
        tables: JSON files of ``ecoformer tables``.

    Raises:
        InputError: one is no such file, or holds no accuracy.
    """
    return draw_points([row for table in tables for row in _read_rows(table)])


def draw_points(rows: Sequence[Row], title: str = "top-1 %") -> Figure:
    """Draw accuracy against energy of rows with ``name, energy_pj, top1`` and maybe an interval.

    Args:
        title: of what stands in ``top1``.
    """
    figure, (axes,) = make_figure(width=6.0)
    # There are ten colours; then they come again with another marker.
    markers = (marker for marker in cycle("os^D") for _ in range(10))
    for row, marker in zip(rows, markers, strict=False):
        axes.errorbar(
            float(row["energy_pj"] or 0) / 1e9,
            float(row["top1"] or 0),
            row.get("top1_ci95"),
            fmt=marker,
            capsize=3,
            label=row["name"],
        )
    axes.set(xlabel="energy an image, mJ (45 nm model)", ylabel=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _read_rows(table: Path) -> list[Row]:
    try:
        rows = [row for row in json.loads(table.read_text())["rows"] if "top1" in row]
    except OSError as error:
        raise InputError(f"cannot read {table} ({error.strerror}); give a table's JSON.") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{table} is no table of ecoformer tables in JSON.") from None
    if not rows:
        raise InputError(f"{table} holds no accuracy; make it with data.")
    return rows


def draw_cost(variant: str, resolutions: Sequence[int]) -> Figure:
    """Draw energy against resolution, logarithmic both ways, a line an attention kind.

    Args:
        resolutions: image sides, pixels.

    Raises:
        InputError: no such backbone.
    """
    figure, (axes,) = make_figure(width=6.0)
    sides = sorted(resolutions)
    family = find_family(variant)
    kinds = family.kinds(variant)
    for place, kind in enumerate(kinds):
        costs = [
            describe_cost(variant, kind, input_size=side, is_executed_counted=False)
            for side in sides
        ]
        energy_mj = [float(cost["energy_pj"] or 0) / 1e9 for cost in costs]
        axes.plot(
            sides,
            energy_mj,
            marker=".",
            label=family.label(kind),
            # Some lie on top of each other: through a dashed line the next one is seen.
            linestyle="--" if place % 2 else "-",
            zorder=3 - place / len(kinds),
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="image side, pixels",
        ylabel="energy an image, mJ (45 nm model)",
        title=variant,
        xticks=sides,
        xticklabels=[str(side) for side in sides],
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
