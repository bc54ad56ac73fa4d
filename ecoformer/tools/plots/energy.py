"""Draw where the energy of an image goes: arithmetic on paper, as executed, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ecoformer.cost.prices import Prices
from ecoformer.models.registry import find_family
from ecoformer.tools.figures import make_figure
from ecoformer.tools.tables.energy import describe_energy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_energy(variant: str, input_sizes: Sequence[int], prices: Prices) -> Figure:
    """Draw four points an attention kind, on axes a resolution: one image, alone.

    Memory is drawn at its least; with N x N maps it is what softmax takes without fusion.

    Args:
        input_sizes: image sides, pixels.

    Raises:
        InputError: no such backbone.
    """
    sides = sorted(input_sizes)
    rows, _ = describe_energy([variant], input_sizes=sides, batch_size=1, prices=prices)
    label = find_family(variant).label
    figure, all_axes = make_figure(len(sides), width=4.2, height=4.2)
    mac_pj = prices.mul_pj + prices.add_pj
    memory = f"{prices.memory.lower().replace(' ', '_')}"
    parts = (
        ("arithmetic, as the paper counts", "energy_pj", 1.0),
        ("arithmetic, as executed", "executed", mac_pj),
        (f"{prices.memory}, softmax fused", f"{memory}_low_pj", 1.0),
        (f"{prices.memory}, N x N maps moved too", f"{memory}_with_maps_low_pj", 1.0),
    )
    for axes, side in zip(all_axes, sides, strict=True):
        shown = [row for row in rows if row["input_size"] == side]
        for place, (name, key, scale) in enumerate(parts):
            energy_mj = [scale * float(row[key] or 0) / 1e9 for row in shown]
            # A little apart, since some are nearly equal.
            heights = [position + 0.14 * (place - 1.5) for position in range(len(shown))]
            axes.plot(energy_mj, heights, "osDX"[place], label=name)
        axes.set(xscale="log", xlabel="energy an image, mJ", title=f"{side} px")
        axes.invert_yaxis()
        axes.xaxis.set_minor_formatter("")
        axes.grid(which="both", axis="x", alpha=0.2)
        is_first = axes is all_axes[0]
        if not is_first:
            axes.sharex(all_axes[0])
        axes.set_yticks(
            range(len(shown)), [label(str(r["name"])) if is_first else "" for r in shown]
        )
    figure.suptitle(f"{variant}, {prices.node} {prices.precision}")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
