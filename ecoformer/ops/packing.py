"""Codes as bits: eight codes of +1 or -1 in a byte, instead of four bytes for each.

Shapes: K hash bits, W = ceil(K / 8) bytes.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ecoformer.errors import InputError

_BITS_PER_WORD = 8


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes [..., K] to [..., W], uint8.

    Bit ``k % 8`` of byte ``k // 8``, counted from the lowest, is 1 where code k is positive; bits
    beyond K are 0. Two rows differ in as many codes as their bytes, by ``^``, have bits set.
    """
    bits = torch.nn.functional.pad(codes > 0, (0, -codes.shape[-1] % _BITS_PER_WORD))
    bits = rearrange(bits, "... (w b) -> ... w b", b=_BITS_PER_WORD)
    return (bits * _bit_values(codes)).sum(-1, dtype=torch.uint8)


def unpack_codes(words: Tensor, num_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Give the codes [..., K] in {-1, +1} that ``pack_codes`` packed.

    Args:
        words: [..., W], uint8.
        num_bits: K.

    Raises:
        InputError: ``words`` are no bytes, or not as many as K bits take.
    """
    num_words = -(-num_bits // _BITS_PER_WORD)
    if words.dtype != torch.uint8 or words.shape[-1] != num_words:
        raise InputError(
            f"{num_bits} bits are {num_words} bytes of torch.uint8 along the last axis, not "
            f"{words.shape[-1]} of {words.dtype}; give what pack_codes returned and its K."
        )
    bits = rearrange(words.unsqueeze(-1) & _bit_values(words) != 0, "... w b -> ... (w b)")
    return bits[..., :num_bits].to(dtype) * 2 - 1


def _bit_values(like: Tensor) -> Tensor:
    return 2 ** torch.arange(_BITS_PER_WORD, dtype=torch.uint8, device=like.device)
