"""Count multiplications, additions, energy, area and memory traffic of one image.

Convolution, linear and normalisation count as many multiplications as additions; attention kinds
tell their own. GELU, ReLU, softmax, pooling and residual sums count nothing. All but the traffic
is the paper's model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecoformer.attention import MultiHeadAttention, SoftmaxAttention
from ecoformer.cost.prices import PAPER_PRICES
from ecoformer.cost.traffic import (
    ProductCounter,
    count_attention_values,
    count_values,
    count_weights,
    find_input,
)
from ecoformer.errors import InputError
from ecoformer.hashing import hash_layers

MUL_AREA_UM2 = 7700
ADD_AREA_UM2 = 4184


@dataclass(frozen=True)
class LayerCost:
    """Operations of one layer for one image, and the values that it moves.

    ``kind`` is ``"convolution"``, ``"linear"``, ``"normalisation"``, ``"products"`` of activations,
    or as ``"msa attention"``.

    Args:
        num_weights: that it holds, and reads once a batch.
        num_values: that it reads and writes for one image, softmax fused.
        num_map_values: of its N x N maps, where softmax is not fused.
    """

    name: str
    kind: str
    mul: int
    add: int
    num_weights: int = 0
    num_values: int = 0
    num_map_values: int = 0


@dataclass(frozen=True)
class Cost:
    """Operations of a model for one image, and what they cost in 45 nm silicon.

    ``layers`` run in this order. ``num_parameters`` counts no buffers, and so no hash functions;
    ``input_size`` is (height, width) in pixels.

    Source: EcoFormer, arXiv 2209.09004; a float32 operation in 45 nm: Horowitz, ISSCC 2014.
    """

    layers: tuple[LayerCost, ...]
    num_parameters: int
    input_size: tuple[int, int]

    @property
    def mul(self) -> int:
        return sum(layer.mul for layer in self.layers)

    @property
    def add(self) -> int:
        return sum(layer.add for layer in self.layers)

    @property
    def energy_pj(self) -> float:
        """Energy of the arithmetic by the paper's prices, picojoules."""
        return PAPER_PRICES.price_operations(self.mul, self.add)

    @property
    def area_um2(self) -> int:
        """Area of one unit an operation, square micrometres."""
        return MUL_AREA_UM2 * self.mul + ADD_AREA_UM2 * self.add

    def traffic_bytes(
        self, value_bytes: int = 4, *, batch_size: int = 1, with_maps: bool = False
    ) -> float:
        """Bytes that an image of a batch moves to and from memory.

        Args:
            batch_size: images that share one reading of the weights.
            with_maps: softmax is not fused: each N x N map is written, and read again.
        """
        num_values = sum(
            layer.num_weights / batch_size + layer.num_values + 2 * layer.num_map_values * with_maps
            for layer in self.layers
        )
        return value_bytes * num_values

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Map kinds of layers to (multiplications, additions), in order of appearance."""
        totals: dict[str, tuple[int, int]] = {}
        for layer in self.layers:
            mul, add = totals.get(layer.kind, (0, 0))
            totals[layer.kind] = (mul + layer.mul, add + layer.add)
        return totals


@torch.no_grad()
def count_cost(model: nn.Module, input_size: int | tuple[int, int] = 224) -> Cost:
    """Count the operations of one image of ``input_size`` pixels, a side or (height, width).

    Any model works, on any device and in any mode. ``MultiHeadAttention`` tells its own cost; of
    other classes the products of queries, keys and values are counted as they are computed, as
    ``"msa attention"`` where there is a softmax. It needs no fit, is not touched, and computes
    nothing.

    Raises:
        InputError: the model does not take images of this size.

    Source: EcoFormer and its released counter.
    """
    shadow, image = without_data(model, input_size)
    layers: list[LayerCost] = []
    products, written = ProductCounter(), dict[int, int]()

    def watch(name: str, kind: str, count: _Count) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            mul, add = count(module, args, keywords, output)
            if isinstance(module, nn.Linear):
                products.forget_projection()
            num_values = count_values(module, find_input(args, keywords), output, written)
            is_attention = isinstance(module, MultiHeadAttention)
            num_maps = products.take().num_map_values if is_attention else 0
            layers.append(
                LayerCost(name, kind, mul, add, count_weights(module), num_values, num_maps)
            )

        return hook

    def watch_products(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen = products.take()
            num_operations, num_weights, num_values = seen.projected
            if num_operations:
                costs = (num_operations, num_operations, num_weights, num_values, 0)
                layers.append(LayerCost(name, "linear", *costs))
            if seen.mul:
                kind = f"{SoftmaxAttention.kind} attention" if seen.num_map_values else "products"
                num_values = count_attention_values(module, written)
                maps = seen.num_map_values
                layers.append(LayerCost(name, kind, seen.mul, seen.add, 0, num_values, maps))

        return hook

    told = tuple(f"{n}." for n, m in shadow.named_modules() if isinstance(m, MultiHeadAttention))
    for name, module in shadow.named_modules():
        for kind, (counted, count) in _COUNTERS.items():
            if isinstance(module, counted):
                if isinstance(module, MultiHeadAttention):
                    kind = f"{module.kind} attention"
                module.register_forward_hook(watch(name, kind, count), with_kwargs=True)
        # Whatever multiplies activations by activations, and does not tell its cost itself; not a
        # part of it, such as its softmax.
        if any(module.children()) and not f"{name}.".startswith(told):
            module.register_forward_hook(watch_products(name))
    try:
        with products:
            shadow(image)
    except RuntimeError as error:
        shape, reason = list(image.shape), str(error).partition("\n")[0]
        raise InputError(
            f"A cost is that of an image {shape}, which the model does not take: {reason}"
        ) from error
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    height, width = image.shape[-2:]
    return Cost(tuple(layers), num_parameters, (height, width))


def without_data(model: nn.Module, input_size: int | tuple[int, int]) -> tuple[nn.Module, Tensor]:
    """Copy a model without data, in eval mode and as if fitted, and make an image for it.

    Both on the meta device; the image has the channels of the first convolution.
    """
    # deepcopy asks this table first, so no weight is ever copied.
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    shadow = copy.deepcopy(model, memo).eval()
    for layer in hash_layers(shadow).values():
        layer.set_functions(
            weight=layer.weight, kernel_mean=layer.kernel_mean, anchors=layer.anchors
        )
    in_chans = next((m.in_channels for m in shadow.modules() if isinstance(m, nn.Conv2d)), 3)
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    return shadow, torch.empty(1, in_chans, height, width, device="meta")


def _count_convolution(module: nn.Module, args: Any, keywords: Any, out: Tensor) -> tuple[int, int]:
    assert isinstance(module, nn.Conv2d)
    products = math.prod(module.kernel_size) * module.in_channels // module.groups
    operations = out.numel() * (products + (module.bias is not None))
    return operations, operations


def _count_linear(module: nn.Module, args: Any, keywords: Any, out: Tensor) -> tuple[int, int]:
    assert isinstance(module, nn.Linear)
    operations = out.numel() * module.in_features
    return operations, operations


def _count_norm(module: nn.Module, args: Any, keywords: Any, out: Tensor) -> tuple[int, int]:
    return 2 * out.numel(), 2 * out.numel()


def _count_attention(module: nn.Module, args: Any, keywords: Any, out: Any) -> tuple[int, int]:
    assert isinstance(module, MultiHeadAttention)
    # One image runs through: further rows are what a model has folded into the batch.
    return module.count_call(args, keywords, out)


_Count = Callable[[nn.Module, Any, Any, Any], tuple[int, int]]
_COUNTERS: dict[str, tuple[type[nn.Module], _Count]] = {
    "convolution": (nn.Conv2d, _count_convolution),
    "linear": (nn.Linear, _count_linear),
    "normalisation": (nn.LayerNorm, _count_norm),
    "attention": (MultiHeadAttention, _count_attention),
}
