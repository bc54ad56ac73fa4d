"""The method in plain PyTorch operations."""

from __future__ import annotations

from torch import Tensor

from ecoformer.hash_config import ValueBias
from ecoformer.ops import reference
from ecoformer.ops.attention import hash_attention
from ecoformer.ops.backends.base import ComposedBackend, HashFunctions
from ecoformer.ops.codes import encode, normalize_rows


class EagerBackend(ComposedBackend):
    """The halves ``encode`` and ``hash_attention``, in time and memory linear in N."""

    name = "eager"

    def compose(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        codes = encode(normalize_rows(q), **functions._asdict(), key_mask=key_mask)
        return hash_attention(codes, v, _value_bias(is_normalized), key_mask=key_mask)


class ReferenceBackend(ComposedBackend):
    """The slow truth: time and memory grow with N^2."""

    name = "reference"

    def compose(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        return reference.kernelized_hash_attention(
            q,
            v,
            **functions._asdict(),
            value_bias=_value_bias(is_normalized),
            key_mask=key_mask,
        )


def _value_bias(is_normalized: bool) -> ValueBias:
    return "normalized" if is_normalized else "released"
