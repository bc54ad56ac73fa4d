"""The released layout and ours, both ways, for every released row."""

from __future__ import annotations

import pytest
import torch

from ecoformer.checkpoint.layout import to_ours, to_released
from tests.checkpoint.weights import released_shapes, small_state

ROWS = sorted(released_shapes())


@pytest.mark.parametrize("row", ROWS)
def test_released_layout_survives_the_way_there_and_back(row: str) -> None:
    released = small_state(row)
    ours = to_ours(released)
    back = to_released(ours)
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in released.items()
    }
    for name, tensor in back.items():
        expected = released[name]
        is_unused = name.endswith("projection_matrix")
        torch.testing.assert_close(
            tensor, torch.zeros_like(expected) if is_unused else expected, rtol=0, atol=0
        )


@pytest.mark.parametrize("row", [row for row in ROWS if row.endswith("/ecoformer")])
def test_hash_functions_of_a_released_file_are_fitted_and_named_as_ours(row: str) -> None:
    released = small_state(row)
    ours = to_ours(released)
    layers = [name.removesuffix("to_qk.weight") for name in ours if name.endswith("to_qk.weight")]
    assert layers
    for layer in layers:
        heads, bits, anchors = released[f"{layer}fast_attention.ksh.A"].shape
        assert ours[f"{layer}hash.weight"].shape == (heads, bits, anchors)
        assert ours[f"{layer}hash.kernel_mean"].shape == (heads, anchors)
        assert ours[f"{layer}hash.anchors"].shape[:2] == (heads, anchors)
        assert bool(ours[f"{layer}hash.is_fitted"])
    assert not any("fast_attention" in name for name in ours)


def test_a_performer_keeps_its_projection_matrix_both_ways() -> None:
    state = {"attn.fast_attention.projection_matrix": torch.ones(110, 32)}
    assert to_ours(state) == state
    assert to_released(state) == state


def test_a_lone_attention_layer_has_the_same_layout() -> None:
    names = ("A", "mvec", "anchor")
    shapes = ((1, 16, 25), (1, 1, 1, 25), (1, 1, 25, 32))
    state = {f"fast_attention.ksh.{n}": torch.ones(s) for n, s in zip(names, shapes, strict=True)}
    buffers = {f"hash.{name}" for name in ("weight", "kernel_mean", "anchors", "is_fitted")}
    assert set(to_ours(state)) == buffers
