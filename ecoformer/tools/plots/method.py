"""Draw the method on a few tokens, by the package's own operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecoformer.hashing import fit_hash
from ecoformer.ops import encode, hash_attention
from ecoformer.ops.codes import kernel_features, normalize_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUM_TOKENS, _WIDTH, _NUM_ANCHORS, _NUM_BITS = 18, 8, 6, 8
_LEARNING = """\
W is learned from it,
bit by bit: the most
similar pairs get equal
bits, the least similar
unequal ones"""


def draw_method() -> Figure:
    """Draw how tokens become codes, codes become attention, and from what codes are learned."""
    from matplotlib.figure import Figure

    x, v = _draw_tokens()
    anchors = x[0, 0, :: _NUM_TOKENS // _NUM_ANCHORS][:_NUM_ANCHORS].unsqueeze(0)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, _NUM_BITS, _NUM_ANCHORS, generator=generator)
    fit = fit_hash(x, anchors=anchors, weight=weight, num_similar=4)
    codes = encode(x, anchors=anchors, weight=fit.weight, kernel_mean=fit.kernel_mean)
    panels = {
        "a": (x, "queries = keys, unit rows\n$x$: N x D"),
        "b": (kernel_features(x, anchors).mT, "similarity to anchors\n$\\kappa$: N x M"),
        "c": (codes, "binary codes\n$h = \\mathrm{sign}(\\kappa W^T)$: N x K"),
        "d": (codes.mT @ v, "added up once\n$Z = \\sum_j h_j v_j^T$: K x D"),
        "e": (hash_attention(codes, v), "output, by additions\n$\\propto h_i Z + c\\,v_i$: N x D"),
        "f": (x @ x.mT, "similarity of tokens, N x N"),
        "g": (codes @ codes.mT, "what codes keep of it\n$h_i \\cdot h_j$"),
    }
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    axes = figure.subplot_mosaic("abcde;.ftg.")
    for name, (values, title) in panels.items():
        _show(axes[name], values[0, 0], title)
    axes["t"].text(0.5, 0.5, _LEARNING, ha="center", va="center", fontsize=10)
    axes["t"].axis("off")
    for start, end in ("ab", "bc", "cd", "de"):
        _connect(axes[start], (1.04, 0.5), axes[end], (-0.06, 0.5))
    _connect(axes["f"], (1.03, 0.5), axes["t"], (0.1, 0.5))
    _connect(axes["t"], (0.5, 0.75), axes["c"], (0.5, -0.06))
    _connect(axes["c"], (0.8, -0.06), axes["g"], (-0.06, 0.9))
    return figure


def _draw_tokens() -> tuple[Tensor, Tensor]:
    """Draw unit rows in three groups, and values: [1, 1, N, D] each."""
    generator = torch.Generator().manual_seed(3)
    groups = torch.randn(3, _WIDTH, generator=generator).repeat_interleave(_NUM_TOKENS // 3, 0)
    noise = torch.randn(_NUM_TOKENS, _WIDTH, generator=generator)
    values = torch.randn(1, 1, _NUM_TOKENS, _WIDTH, generator=generator)
    return normalize_rows((groups + 0.5 * noise)[None, None]), values


def _show(axes: Axes, values: Tensor, title: str) -> None:
    limit = float(values.abs().max())
    axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[])


def _connect(
    start: Axes, start_at: tuple[float, float], end: Axes, end_at: tuple[float, float]
) -> None:
    """Draw an arrow from one axes to another."""
    from matplotlib.patches import ConnectionPatch

    arrow = ConnectionPatch(
        start_at,
        end_at,
        coordsA=start.transAxes,
        coordsB=end.transAxes,
        arrowstyle="-|>",
        mutation_scale=14,
        color="0.3",
    )
    start.figure.add_artist(arrow)
