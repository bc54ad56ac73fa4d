"""Start and save pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ecoformer.files import open_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def make_figure(
    num_axes: int = 1, *, width: float = 5.0, height: float = 3.6
) -> tuple[Figure, list[Axes]]:
    """Start a picture of axes side by side, each of a width in inches, without a window."""
    # Half a second to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num_axes, height), layout="constrained")
    return figure, [figure.add_subplot(1, num_axes, place) for place in range(1, num_axes + 1)]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture as PNG, whole or not at all.

    Raises:
        InputError: the disk refuses.
    """
    with open_atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
