"""A mean that depends neither on the order of its terms nor on the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecoformer.ranks import is_main, sum_over_ranks

# Terms are rounded to multiples of 2^-24, finer than a float32 above 1. One above 2^20 counts as
# that: 2^19 of them still fit into an int64.
_UNITS = 2**24
_LARGEST = 2**20


class ExactMean:
    """A mean over all ranks, by integer sums, which no order changes; goes on from ``sums()``."""

    def __init__(self, device: torch.device, sums: Sequence[int] = (0, 0, 0)) -> None:
        # Rank 0 goes on with what all ranks had; the others start from nothing.
        start = tuple(sums) if is_main() else (0, 0, 0)
        self.device = device
        self._sums = torch.tensor(start, dtype=torch.int64, device=device)

    def add(self, terms: Tensor) -> None:
        """Count terms [...], float; one that is not finite makes the mean NaN."""
        terms = terms.detach()
        is_finite = terms.isfinite()
        # A copy: terms in float64 stay what they are.
        units = terms.to(torch.float64, copy=True).nan_to_num_(0, 0, 0)
        units.clamp_(-_LARGEST, _LARGEST).mul_(_UNITS)
        self._sums += torch.stack(
            [units.round_().long().sum(), is_finite.sum(), (~is_finite).sum()]
        )

    def sums(self) -> list[int]:
        """Units, number of finite terms and number of others, of all ranks; each must ask."""
        return sum_over_ranks(self._sums.clone()).tolist()

    def mean(self) -> float:
        """NaN where there is no term, or one that is not finite; every rank must ask."""
        units, num_finite, num_others = self.sums()
        return units / (_UNITS * num_finite) if num_finite and not num_others else float("nan")
