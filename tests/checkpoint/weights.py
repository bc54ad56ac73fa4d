"""State dicts of every released row, filled by name, and modules that hold just such entries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from tests.golden.fill import fill

Shape = tuple[int, ...]


@cache
def released_shapes() -> dict[str, dict[str, Shape]]:
    """``model/attention`` -> released name -> shape."""
    text = (Path(__file__).parents[1] / "golden" / "state_dicts.json").read_text()
    return {
        row: {name: tuple(shape) for name, shape in content["entries"].items()}
        for row, content in json.loads(text).items()
    }


def fill_state(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Tensors of these released names and shapes, filled by name."""
    return {name: torch.from_numpy(fill(name, shape)) for name, shape in shapes.items()}


@cache
def small_state(row: str) -> Mapping[str, Tensor]:
    """A released row, filled by name, but tiny: only hash functions keep their widths."""
    shapes = {
        name: shape
        if "fast_attention" in name
        else tuple(size // 32 if size % 32 == 0 else size for size in shape)
        for name, shape in released_shapes()[row].items()
    }
    return MappingProxyType(fill_state(shapes))


class Entries(nn.Module):
    """A module whose state dict looks like a given one, with -7 everywhere and nothing fitted."""

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in like.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            is_flag = tensor.dtype is torch.bool
            value = torch.tensor(False) if is_flag else torch.full_like(tensor, -7.0)
            owner.register_buffer(leaf, value)
