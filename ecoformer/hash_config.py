"""Settings of the hash functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ecoformer.errors import InputError

ValueBias = Literal["released", "normalized"]


@dataclass(frozen=True)
class HashConfig:
    """Size of the binary codes and how they are learned.

    Raises:
        InputError: a count below 1, or an unknown ``value_bias``.

    Source: EcoFormer, arXiv 2209.09004; the released implementation.
    """

    num_bits: int = 16
    """K, bits of a hash code."""
    num_anchors: int = 25
    """M, tokens that kernel features are measured against."""
    num_similar: int = 10
    """T, most and least similar tokens that the fit pairs with each token."""
    num_fit_steps: int = 100
    """Optimiser steps that the fit spends on each bit."""
    value_bias: ValueBias = "released"
    """Form of the attention's constant term: as released, or a true weighted mean."""

    def __post_init__(self) -> None:
        for name in ("num_bits", "num_anchors", "num_similar", "num_fit_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"{name} is {value!r}; expected int.")
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}.")
        check_value_bias(self.value_bias)


def check_value_bias(value_bias: str) -> None:
    """Refuse what is no ``ValueBias`` with an InputError."""
    if value_bias not in get_args(ValueBias):
        raise InputError(f"value_bias is 'released' or 'normalized', not {value_bias!r}.")
