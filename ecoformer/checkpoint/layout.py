"""The table between our names and those of the released EcoFormer files.

Only hash functions differ: H heads, K hash bits, M anchors, D head dim.
Source: file layout of the released implementation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ecoformer.errors import InputError


class _Row(NamedTuple):
    ours: str
    released: str
    # Axes of length one that the released tensor has and ours lacks.
    unit_axes: tuple[int, ...]


_WEIGHT = _Row("hash.weight", "fast_attention.ksh.A", ())  # [H, K, M]
_KERNEL_MEAN = _Row("hash.kernel_mean", "fast_attention.ksh.mvec", (0, 2))  # [H, M]
_ANCHORS = _Row("hash.anchors", "fast_attention.ksh.anchor", (0,))  # [H, M, D]
_TABLE = (_WEIGHT, _KERNEL_MEAN, _ANCHORS)

# Ours alone: a released file holds fitted functions only.
IS_FITTED = "hash.is_fitted"
# [int(D ln D), D]. Nothing reads it beside a hash function, but the released model demands it;
# a Performer layer has one of the same name, and needs it.
PROJECTION = "fast_attention.projection_matrix"
HASH_WEIGHT = _WEIGHT.ours
HASH_ANCHORS = _ANCHORS.ours


def owner_of(name: str, suffix: str) -> str | None:
    """Cut whole parts off the end of a state-dict name; None where it ends in others.

    ``block1.0.attn.hash.weight`` without ``hash.weight`` is ``block1.0.attn.``.
    """
    owner = name.removesuffix(suffix)
    return owner if owner != name and (not owner or owner.endswith(".")) else None


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the hash functions of a released file into our layout; ours pass unchanged.

    Those of a released file are fitted, always. Projection matrices beside them are left out.
    Tensors share memory with those of ``state``.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for row in _TABLE:
            owner = owner_of(name, row.released)
            if owner is not None:
                # One with fewer axes passes as it is: its shape is reported where it is loaded.
                is_whole = tensor.ndim > max(row.unit_axes, default=-1)
                ours[owner + row.ours] = tensor.squeeze(row.unit_axes) if is_whole else tensor
                if row is _WEIGHT:
                    ours[owner + IS_FITTED] = torch.tensor(True)
                break
        else:
            owner = owner_of(name, PROJECTION)
            if owner is None or owner + _WEIGHT.released not in state:
                ours[name] = tensor
    return ours


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring hash functions from our layout into the released one, which its model loads strictly.

    Tensors share memory with those of ``state``.

    Raises:
        InputError: a hash function is not fitted, which the released layout cannot say.
    """
    released: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if owner_of(name, IS_FITTED) is not None:
            if not tensor:
                raise InputError(
                    f"{name} is false, and the released layout has room for fitted hash functions "
                    "only: call ecoformer.fit_hash_functions(model, images) first."
                )
            continue
        for row in _TABLE:
            owner = owner_of(name, row.ours)
            if owner is not None:
                for axis in row.unit_axes:
                    tensor = tensor.unsqueeze(axis)
                released[owner + row.released] = tensor
                if row is _ANCHORS:
                    dim = tensor.shape[-1]
                    released[owner + PROJECTION] = tensor.new_zeros(int(dim * math.log(dim)), dim)
                break
        else:
            released[name] = tensor
    return released


def export_released(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's weights to the CPU, in the layout of the released ``.pth`` files.

    The released model loads them strictly.

    Raises:
        InputError: a hash function is not fitted, or the model was converted: the released code
            has no such model.
    """
    # Not above: it imports timm, which asks for our models, and they for this module.
    from ecoformer.models.conversion import ConvertedAttention

    if any(isinstance(module, ConvertedAttention) for module in model.modules()):
        raise InputError(
            "the released layout is that of PVTv2 and Twins, and this model was converted from "
            "another; save model.state_dict(), and load it into one converted alike."
        )
    return to_released(
        {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    )
