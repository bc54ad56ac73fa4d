"""Count what today's hardware executes of a model, beside what the paper's model prices."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ecoformer.cost.count import without_data
from ecoformer.hashing import hash_layers
from ecoformer.ops.backends.native import library

_Shape = tuple[int, ...]


def count_executed(model: nn.Module, input_size: int | tuple[int, int]) -> int:
    """Count the multiply-adds of matrix products and convolutions of one image, as they run.

    A processor of today multiplies and adds in one instruction. A product with a code of +1 and
    -1 is an addition on paper, but costs it as much as any other.

    Normalisation, activations and other work by value are not among them. The model needs no fit,
    is not touched, and computes nothing.

    Args:
        input_size: pixels, a side or (height, width).
    """
    # The counter takes a multiply-add for two operations.
    return _run_counter(model, input_size, _count_hash_attention) // 2


def count_added_codes(model: nn.Module, input_size: int | tuple[int, int]) -> tuple[int, int]:
    """Count the products with codes that this CPU executes as additions, for one image.

    Returns:
        Multiply-adds of ``count_executed`` that the C++ backend spares, and the additions that it
        executes instead; 0 and 0 where it cannot be compiled.
    """
    products = additions = 0
    if not hash_layers(model) or library.load():
        return products, additions

    def count(
        _: _Shape, v: _Shape, anchors: _Shape, weight: _Shape, *__: object, **___: object
    ) -> int:
        nonlocal products, additions
        num_values = math.prod(v[:3]) * (v[-1] + 1)
        products += 2 * num_values * weight[1]
        # A row is added to a bucket for each digit of its code, and one is looked up.
        additions += 2 * num_values * torch.ops.ecoformer_native.num_digits(weight[1], v[-1])
        return 0

    _run_counter(model, input_size, count)
    return products, additions


@torch.no_grad()
def _run_counter(
    model: nn.Module, input_size: int | tuple[int, int], count_attention: Callable[..., int]
) -> int:
    """Sum PyTorch's counts of one image, and those of our operator, which it cannot look into."""
    shadow, image = without_data(model, input_size)
    ours = {torch.ops.ecoformer.kernelized_hash_attention: count_attention}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        shadow(image)
    return int(counter.get_total_flops())


def _count_hash_attention(
    q: _Shape, v: _Shape, anchors: _Shape, weight: _Shape, *_: object, **__: object
) -> int:
    """Count distances, projections to bits, and the products of codes."""
    num_images, num_heads, num_tokens, head_dim = v
    num_bits, num_anchors = weight[1:]
    # Codes meet the values and their own sum twice: when it is added up, and when it is asked.
    a_token = num_anchors * (q[-1] + num_bits) + 2 * num_bits * (head_dim + 1)
    return 2 * num_images * num_heads * num_tokens * a_token
