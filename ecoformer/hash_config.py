"""Settings of the hash functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ecoformer.errors import InputError

ValueBias = Literal["released", "normalized"]


@dataclass(frozen=True)
class HashConfig:
    """Size of the binary codes and how they are learned.

    Args:
        num_bits: K, bits of a code. Flag ``--nbits``.
        num_anchors: M, tokens that the kernel features are measured against. ``--anchor``.
        num_similar: T, most and least similar tokens that each token is pulled to and pushed
            from during the fit. ``--topk``.
        num_fit_steps: optimiser steps a bit.
        value_bias: ``"released"`` or ``"normalized"``, see ``hash_attention``.

    Raises:
        InputError: a count below 1, or an unknown ``value_bias``.

    Source: EcoFormer, arXiv 2209.09004; the released implementation.
    """

    num_bits: int = 16
    num_anchors: int = 25
    num_similar: int = 10
    num_fit_steps: int = 100
    value_bias: ValueBias = "released"

    def __post_init__(self) -> None:
        for name in ("num_bits", "num_anchors", "num_similar", "num_fit_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        check_value_bias(self.value_bias)


def check_value_bias(value_bias: str) -> None:
    """Refuse what is no ``ValueBias``.

    Args:
        value_bias: what a user gave.

    Raises:
        InputError: another one.
    """
    if value_bias not in get_args(ValueBias):
        raise InputError(f"value_bias is 'released' or 'normalized', not {value_bias!r}.")
