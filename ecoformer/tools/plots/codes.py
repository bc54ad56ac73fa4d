"""Draw the attention that one token of an image pays, under softmax and through codes.

Shapes: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from ecoformer.attention import EcoFormerAttention, SoftmaxAttention
from ecoformer.data.datasets import IMAGE_SETS, LabelledImages, open_dataset
from ecoformer.engine.run import Run
from ecoformer.errors import InputError
from ecoformer.ops import hash_attention_weights
from ecoformer.tools.figures import make_figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL import Image


@dataclass(frozen=True)
class TokenView:
    """What one token sees of a map, [height, width] each.

    Args:
        softmax: weights that softmax attention gives to the values.
        codes: weights that EcoFormer attention gives to them, negative ones among them under the
            released bias.
        equal_bits: share of the bits of its code that another token's has too.
        bits: codes of all tokens in the first head, [K, height, width], of -1 and +1.
    """

    softmax: Tensor
    codes: Tensor
    equal_bits: Tensor
    bits: Tensor


@torch.inference_mode()
def view_token(
    softmax: nn.Module, ecoformer: nn.Module, image: Tensor, layer: str, token: tuple[int, int]
) -> TokenView:
    """Look at one token in the same layer of two models; heads are averaged.

    Args:
        ecoformer: fitted.
        image: [1, 3, height, width], float, normalised.
        token: row and column on the layer's map.

    Raises:
        InputError: a model has no such attention there, or the map no such token.
    """
    ours, x, size = _capture(ecoformer, layer, image, EcoFormerAttention)
    theirs, y, _ = _capture(softmax, layer, image, SoftmaxAttention)
    row, column = token
    if not (0 <= row < size[0] and 0 <= column < size[1]):
        raise InputError(f"--token {row} {column}: the map of {layer} is {size[0]} x {size[1]}.")
    index = row * size[1] + column
    assert isinstance(ours, EcoFormerAttention) and isinstance(theirs, SoftmaxAttention)
    (rows,) = ours.split_heads(ours.to_qk(x))
    codes = ours.hash.encode(rows)
    query = torch.tensor([index], device=x.device)
    weights = hash_attention_weights(codes, query, ours.hash.config.value_bias)
    q, k, _ = theirs.split_heads(*theirs.qkv(y).chunk(3, dim=-1))
    peers = (q[:, :, query] @ k.mT * theirs.head_dim**-0.5).softmax(-1)
    equal_bits = (codes == codes[:, :, query]).float().mean(-1)  # [B, H, N]
    return TokenView(
        softmax=peers[0, :, 0].mean(0).view(size),
        codes=weights[0, :, 0].mean(0).view(size),
        equal_bits=equal_bits[0].mean(0).view(size),
        bits=rearrange(codes[0, 0], "(h w) k -> k h w", h=size[0]),
    )


def _capture(
    model: nn.Module, layer: str, image: Tensor, kind: type[nn.Module]
) -> tuple[nn.Module, Tensor, tuple[int, int]]:
    """Run a model; return a layer with the tokens and the map size that it was given."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if layer not in modules:
        raise InputError(
            f"--layer {layer}: no {kind.__name__} there; there is one at: {', '.join(modules)}."
        )
    seen: list[tuple[Tensor, tuple[int, int]]] = []
    hook = modules[layer].register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    try:
        model(image)
    finally:
        hook.remove()
    return modules[layer], *seen[0]


@dataclass(frozen=True)
class Pair:
    """The same network with softmax and with EcoFormer attention, and the images of its runs."""

    softmax: nn.Module
    ecoformer: nn.Module
    images: LabelledImages
    input_size: int

    @classmethod
    def of(cls, softmax: Run, ecoformer: Run) -> Pair:
        """Take two runs on the same images.

        Raises:
            InputError: one has another attention, or lacks its data or checkpoint; or its images
                have no one label.
        """
        config = ecoformer.config
        if config.data.data_set not in IMAGE_SETS:
            raise InputError(
                f"{ecoformer.folder} is a run on {config.data.data_set}, and codes are drawn on "
                f"images with one label: give runs on {', '.join(IMAGE_SETS)}."
            )
        side = config.model.input_size
        images = open_dataset(config.data.data_set, config.data.data_path, "val", input_size=side)
        pair = cls(softmax.model, ecoformer.model, images, side)
        if not pair.layers:
            raise InputError(f"{ecoformer.folder} is no run with EcoFormer attention.")
        if not isinstance(dict(pair.softmax.named_modules()).get(pair.layers[0]), SoftmaxAttention):
            raise InputError(
                f"{softmax.folder} is no run of the same model with softmax attention."
            )
        return pair

    @property
    def layers(self) -> list[str]:
        """Names of the layers with codes."""
        modules = self.ecoformer.named_modules()
        return [name for name, module in modules if isinstance(module, EcoFormerAttention)]


def draw_codes(
    pair: Pair, *, index: int = 0, layer: str | None = None, token: tuple[int, int] | None = None
) -> Figure:
    """Draw an image, its codes, their similarity to one token's, and both attentions of that.

    Args:
        index: of the validation image.
        layer: the first with codes unless given.
        token: row and column on the layer's map; its middle unless given.

    Raises:
        InputError: the image, the layer or the token is not there.
    """
    from ecoformer.data.pixels import normalize
    from ecoformer.data.transforms import build_eval_transform

    if not 0 <= index < len(pair.images):
        raise InputError(f"--image {index}: there are {len(pair.images)} validation images.")
    picture, label = pair.images.read(index)
    pixels = normalize(build_eval_transform(pair.input_size)(picture).pixels.unsqueeze(0))
    layer = layer or pair.layers[0]
    if token is None:
        _, _, (height, width) = _capture(pair.ecoformer, layer, pixels, EcoFormerAttention)
        token = height // 2, width // 2
    view = view_token(pair.softmax, pair.ecoformer, pixels, layer, token)
    name = pair.images.class_names[label]
    return _draw(picture, f"{name}, layer {layer}", view, token)


def _draw(picture: Image.Image, title: str, view: TokenView, token: tuple[int, int]) -> Figure:
    from matplotlib.patches import Rectangle

    figure, (image, codes, *maps) = make_figure(5, width=3.0, height=2.7)
    height, width = view.softmax.shape
    # In units of tokens, so that the same square marks the token everywhere.
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    image.imshow(picture, extent=extent)
    image.set_title(title)
    codes.imshow(_tile(view.bits), cmap="cividis", interpolation="none")
    codes.set_title(f"{len(view.bits)} bits of the first head")
    for axes, values, name in zip(
        maps,
        (view.equal_bits, view.codes, view.softmax),
        ("Hamming similarity of codes", "attention through codes", "softmax attention"),
        strict=True,
    ):
        shown = axes.imshow(values.numpy(), extent=extent, cmap="viridis", interpolation="none")
        axes.set_title(name)
        figure.colorbar(shown, ax=axes, shrink=0.75)
    row, column = token
    for axes in (image, codes, *maps):
        axes.set(xticks=[], yticks=[])
    for axes in (image, *maps):
        square = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", lw=2)
        axes.add_patch(square)
    return figure


def _tile(bits: Tensor) -> NDArray[np.float32]:
    """Lay K maps out in a square, with gaps between: [K, height, width] to two axes."""
    columns = math.ceil(math.sqrt(len(bits)))
    rows = -(-len(bits) // columns)
    padded = torch.full((rows * columns, bits.shape[1] + 1, bits.shape[2] + 1), math.nan)
    padded[: len(bits), 1:, 1:] = bits
    tiles: NDArray[np.float32] = rearrange(
        padded, "(r c) h w -> (r h) (c w)", r=rows, c=columns
    ).numpy()
    return tiles
