"""How channels become heads: the order that all weights are laid out in."""

from __future__ import annotations

import pytest
import torch

from ecoformer import InputError
from ecoformer.attention.heads import divide_heads, merge_heads, split_heads


def test_a_head_has_contiguous_channels() -> None:
    x = torch.arange(2 * 5 * 6).view(2, 5, 6)
    heads = split_heads(x, 3)
    assert torch.equal(heads[:, 1], x[:, :, 2:4])
    assert heads.data_ptr() == x.data_ptr()


def test_merging_undoes_splitting() -> None:
    x = torch.arange(2 * 5 * 6).view(2, 5, 6)
    assert torch.equal(merge_heads(split_heads(x, 3)), x)


def test_heads_share_the_channels() -> None:
    assert divide_heads(12, 3) == 4
    for num_heads in (0, 5):
        with pytest.raises(InputError, match=f"{num_heads} heads cannot share 12 channels"):
            divide_heads(12, num_heads)
