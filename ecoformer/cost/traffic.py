"""Count the values that layers move to and from memory.

A layer reads its weights once a batch, its inputs once an image, and writes its outputs once.
Activations, residual sums and pooling are taken as fused into their neighbours. Attention reads
what its projections wrote and writes what the output projection reads; softmax over N x N maps is
fused, as in flash attention, and the maps are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ecoformer.attention import MultiHeadAttention


class AttentionMaps(TorchFunctionMode):
    """Count the values of softmax maps inside a block, one a head, query and key."""

    def __init__(self) -> None:
        super().__init__()
        self._num_values = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            operands = {**dict(zip(("query", "key"), args, strict=False)), **kwargs}
            query, key = operands["query"], operands["key"]
            self._num_values += query.numel() // query.shape[-1] * key.shape[-2]
        return func(*args, **kwargs)

    def take(self) -> int:
        """Return the count since it was last taken."""
        count, self._num_values = self._num_values, 0
        return count


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
        projections = [m for m in module.modules() if isinstance(m, nn.Linear)]
        # That of the output writes as many as it reads, which the heads have written.
        return sum(written.get(id(projection), 0) for projection in projections)
    return inputs.numel() + output.numel()


def find_input(args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Find the tensor that a layer was called with."""
    return next(v for v in (*args, *keywords.values()) if isinstance(v, torch.Tensor))
