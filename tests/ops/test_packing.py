"""Codes as bits: the bytes that NumPy packs, and back without loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import ecoformer
from tests.problems import draw


def draw_codes(num_bits: int) -> Tensor:
    return draw(2, 3, 7, num_bits).sign().float()


@pytest.mark.parametrize("num_bits", [1, 7, 8, 16, 25, 64])
def test_packed_codes_are_the_bits_that_numpy_packs(num_bits: int) -> None:
    codes = draw_codes(num_bits)
    words = ecoformer.pack_codes(codes)
    expected = np.packbits(codes.numpy() > 0, axis=-1, bitorder="little")
    assert words.dtype == torch.uint8
    assert np.array_equal(words.numpy(), expected)
    assert torch.equal(ecoformer.unpack_codes(words, num_bits), codes)
    half = ecoformer.unpack_codes(words, num_bits, torch.bfloat16)
    assert torch.equal(half, codes.bfloat16())


def test_codes_are_packed_from_any_strides_and_dtype() -> None:
    codes = draw_codes(16)
    turned = codes.mT.contiguous().mT
    assert torch.equal(ecoformer.pack_codes(turned.to(torch.int8)), ecoformer.pack_codes(codes))


@pytest.mark.parametrize(
    ("words", "num_bits"),
    [(torch.zeros(3, 2, dtype=torch.uint8), 17), (torch.zeros(3, 2, dtype=torch.int64), 16)],
)
def test_other_words_are_refused(words: Tensor, num_bits: int) -> None:
    with pytest.raises(ecoformer.InputError, match=f"{num_bits} bits are . bytes of torch.uint8"):
        ecoformer.unpack_codes(words, num_bits)
