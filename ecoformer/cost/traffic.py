"""Count the values that layers move to and from memory.

A layer reads its weights once a batch, its inputs once an image, and writes its outputs once.
Activations, residual sums and pooling are taken as fused into their neighbours. Attention reads
what its projections wrote and writes what the output projection reads; softmax over N x N maps is
fused, as in flash attention, and the maps are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode

from ecoformer.attention import MultiHeadAttention

_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}
_SOFTMAXES = {torch.softmax, Tensor.softmax, softmax}


@dataclass(frozen=True)
class Products:
    """Multiplications and additions among activations, and values of softmax maps."""

    mul: int = 0
    add: int = 0
    num_map_values: int = 0


class ProductCounter(TorchFunctionMode):
    """Count products of activations with activations inside a block: what attention does.

    Of softmax attention over N x N' maps, of any class, they are those of ``count_softmax``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen = Products()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is scaled_dot_product_attention:
            names = ("query", "key", "value")
            operands = {**dict(zip(names, args, strict=False)), **kwargs}
            query, key, value = (operands[name] for name in names)
            num_pairs = query.numel() // query.shape[-1] * key.shape[-2]
            self._see(num_pairs * (query.shape[-1] + value.shape[-1]), num_pairs)
        elif func in _PRODUCTS and min(args[0].ndim, args[1].ndim) > 2:
            self._see(out.numel() * args[0].shape[-1])
        elif func in _SOFTMAXES and args[0].ndim > 2:
            self._see(0, out.numel())
        return out

    def _see(self, num_products: int, num_map_values: int = 0) -> None:
        seen = self._seen
        self._seen = Products(
            seen.mul + num_products + num_map_values,
            seen.add + num_products,
            seen.num_map_values + num_map_values,
        )

    def take(self) -> Products:
        """Return what was counted since it was last taken."""
        seen, self._seen = self._seen, Products()
        return seen


def count_weights(module: nn.Module) -> int:
    """Count what a layer holds; of attention, what its projections do not: float buffers."""
    if isinstance(module, MultiHeadAttention):
        return sum(buffer.numel() for buffer in module.buffers() if buffer.is_floating_point())
    return sum(parameter.numel() for parameter in module.parameters())


def count_values(module: nn.Module, inputs: Tensor, output: Tensor, written: dict[int, int]) -> int:
    """Count the values that a layer reads and writes for one image, weights aside.

    Args:
        written: ``id`` of a layer to the values that it wrote; this one is added.
    """
    written[id(module)] = output.numel()
    if isinstance(module, MultiHeadAttention):
        return count_attention_values(module, written)
    return inputs.numel() + output.numel()


def count_attention_values(module: nn.Module, written: dict[int, int]) -> int:
    """Count what heads read and write for one image: what the layer's projections wrote."""
    projections = [m for m in module.modules() if isinstance(m, nn.Linear)]
    # That of the output writes as many as it reads, which the heads have written.
    return sum(written.get(id(projection), 0) for projection in projections)


def find_input(args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Find the tensor that a layer was called with."""
    return next(v for v in (*args, *keywords.values()) if isinstance(v, torch.Tensor))
