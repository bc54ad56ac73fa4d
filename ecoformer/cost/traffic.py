"""Count the values that layers move to and from memory.

A layer reads its weights once a batch, its inputs once an image, and writes its outputs once.
Activations, residual sums and pooling are taken as fused into their neighbours. Attention reads
what its projections wrote and writes what the output projection reads; softmax over N x N maps is
fused, as in flash attention, and the maps are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    linear,
    multi_head_attention_forward,
    scaled_dot_product_attention,
    softmax,
)
from torch.overrides import TorchFunctionMode

from ecoformer.attention import MultiHeadAttention

_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}
_SOFTMAXES = {torch.softmax, Tensor.softmax, softmax}


@dataclass(frozen=True)
class Products:
    """Multiplications and additions among activations, and values of softmax maps.

    Those named ``projected`` are of weights that no ``nn.Linear`` applied: operations of each kind,
    weights, and values read and written.
    """

    mul: int = 0
    add: int = 0
    num_map_values: int = 0
    projected: tuple[int, int, int] = (0, 0, 0)


class ProductCounter(TorchFunctionMode):
    """Count products of activations with activations inside a block: what attention does.

    Of softmax attention over N x N' maps, of any class, they are those of ``count_softmax``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen = self._before = Products()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)

        def operands(*names: str) -> list[Any]:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return [given[name] for name in names]

        if func is scaled_dot_product_attention:
            query, key, value = operands("query", "key", "value")
            num_pairs = query.numel() // query.shape[-1] * key.shape[-2]
            self._see(num_pairs * (query.shape[-1] + value.shape[-1]), num_pairs)
        elif func is multi_head_attention_forward:
            self._see_heads(*args[:5])
        elif func is linear:
            x, weight = operands("input", "weight")
            self._project(out.numel() * x.shape[-1], weight.numel(), x.numel() + out.numel())
        elif func in _PRODUCTS and min(args[0].ndim, args[1].ndim) > 2:
            self._see(out.numel() * args[0].shape[-1])
        elif func in _SOFTMAXES and args[0].ndim > 2:
            self._see(0, out.numel())
        return out

    def _see_heads(
        self, query: Tensor, key: Tensor, value: Tensor, num_channels: int, num_heads: int
    ) -> None:
        """Of a function that calls none of the others: all four projections, then attention."""
        for rows in (query, key, value, query):
            num_rows, num_weights = rows.numel() // rows.shape[-1], rows.shape[-1] * num_channels
            num_values = rows.numel() + num_rows * num_channels
            self._project(num_rows * num_weights, num_weights, num_values)
        num_pairs = query.numel() // query.shape[-1] * key.shape[0]
        self._see(2 * num_pairs * num_channels, num_heads * num_pairs)

    def _see(self, num_products: int, num_map_values: int = 0) -> None:
        seen = self._seen
        self._seen = replace(
            seen,
            mul=seen.mul + num_products + num_map_values,
            add=seen.add + num_products,
            num_map_values=seen.num_map_values + num_map_values,
        )

    def _project(self, *counts: int) -> None:
        self._before = seen = self._seen
        first, second, third = (a + b for a, b in zip(seen.projected, counts, strict=True))
        self._seen = replace(seen, projected=(first, second, third))

    def forget_projection(self) -> None:
        """Leave the last one out: its own module counts it."""
        self._seen = self._before

    def take(self) -> Products:
        """Return what was counted since it was last taken."""
        seen, self._seen = self._seen, Products()
        return seen


def count_weights(module: nn.Module) -> int:
    """Count what a layer holds; of attention, what its projections do not: float buffers."""
    if isinstance(module, MultiHeadAttention):
        return sum(buffer.numel() for buffer in module.buffers() if buffer.is_floating_point())
    return sum(parameter.numel() for parameter in module.parameters())


def count_values(module: nn.Module, inputs: Tensor, output: Any, written: dict[int, int]) -> int:
    """Count the values that a layer reads and writes for one image, weights aside.

    Args:
        output: a tensor; of attention, whatever it returns.
        written: ``id`` of a layer to the values that it wrote; this one is added, unless it is
            attention.
    """
    if isinstance(module, MultiHeadAttention):
        return count_attention_values(module, written)
    written[id(module)] = output.numel()
    return inputs.numel() + output.numel()


def count_attention_values(module: nn.Module, written: dict[int, int]) -> int:
    """Count what heads read and write for one image: what the layer's projections wrote."""
    projections = [m for m in module.modules() if isinstance(m, nn.Linear)]
    # That of the output writes as many as it reads, which the heads have written.
    return sum(written.get(id(projection), 0) for projection in projections)


def find_input(args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Find the tensor that a layer was called with."""
    return next(v for v in (*args, *keywords.values()) if isinstance(v, torch.Tensor))
