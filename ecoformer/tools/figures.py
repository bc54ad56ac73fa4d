"""Start and save pictures."""

from __future__ import annotations

import io
import re
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


def to_svg(figure: Figure, name: str) -> str:
    """Write a picture as SVG that stands inside a page, its text as text.

    What is black takes the page's colour of text, and what is white its variable ``--page``.

    Args:
        name: of letters; it sets the picture's ids apart from those of others on the page.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Of its many ids, most are names of parts, and some of them stand twice.
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    # Text that says no colour is black.
    text = text.replace("<svg", '<svg role="img" fill="currentColor"', 1)
    return text.replace("#000000", "currentColor").replace("#ffffff", "var(--page)")
