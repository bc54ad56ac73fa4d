"""Twins against the released weights, logits, costs and optimizer groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import twins
from ecoformer import HashConfig, InputError, count_cost, fit_hash_functions
from ecoformer.attention import MultiHeadAttention
from ecoformer.attention.base import Size
from ecoformer.config import Config
from ecoformer.engine.optim import create_optimizer
from tests.backbones import (
    assert_golden_cost,
    assert_golden_logits,
    assert_norm_eps,
    assert_released_layout,
    build_empty,
    golden_rows,
)
from tests.twins.tiny import TINY_SVT
from twins import FAMILY
from twins.model import Twins


def kinds_of_stage(model: nn.Module, stage: int) -> list[str]:
    """The attention kind of each block."""
    blocks = model.get_submodule(f"blocks.{stage}").modules()
    return [layer.kind for layer in blocks if isinstance(layer, MultiHeadAttention)]


@pytest.mark.parametrize("row", golden_rows(FAMILY, "state_dicts.json"))
def test_released_names_and_shapes(row: str) -> None:
    assert_released_layout(FAMILY, row)


@pytest.mark.parametrize("row", golden_rows(FAMILY, "logits.json"))
def test_logits(row: str) -> None:
    assert_golden_logits(FAMILY, row)


@pytest.mark.parametrize("row", golden_rows(FAMILY, "cost.json"))
def test_cost(row: str) -> None:
    assert_golden_cost(FAMILY, row)


@pytest.mark.parametrize("row", ["alt_gvt_small/lsa_gsa", "pcpvt_small_v0/ecoformer"])
def test_norm_eps(row: str) -> None:
    assert_norm_eps(build_empty(FAMILY, row))


def test_position_takes_no_weight_decay(golden_dir: Path) -> None:
    golden = json.loads((golden_dir / "lr_schedule.json").read_text())["twins_ecoformer"]
    model = build_empty(FAMILY, golden["model"])
    groups = create_optimizer(model, Config().optim, 1e-3).param_groups
    assert [
        {"weight_decay": group["weight_decay"], "tensors": len(group["params"])} for group in groups
    ] == golden["groups"]
    without = {id(parameter) for parameter in groups[0]["params"]}
    for name, parameter in model.named_parameters():
        is_spared = parameter.ndim == 1 or name.startswith("pos_block.")
        assert (id(parameter) in without) == is_spared, name


@pytest.mark.parametrize(
    ("row", "pair", "last"),
    [
        ("alt_gvt_small/lsa_gsa", ("lsa", "sra"), ("lsa", "sra")),
        ("alt_gvt_small/lsa_msa", ("lsa", "msa"), ("lsa", "msa")),
        ("alt_gvt_small/msa", ("msa", "msa"), ("msa", "msa")),
        ("alt_gvt_small/ecoformer", ("ecoformer", "ecoformer"), ("msa", "msa")),
        ("pcpvt_small_v0/sra", ("sra", "sra"), ("sra", "sra")),
        ("pcpvt_small_v0/msa", ("msa", "msa"), ("msa", "msa")),
        ("pcpvt_small_v0/ecoformer", ("ecoformer", "ecoformer"), ("msa", "msa")),
    ],
)
def test_layouts(row: str, pair: tuple[str, str], last: tuple[str, str]) -> None:
    model = build_empty(FAMILY, row)
    depths = twins.TWINS_VARIANTS[row.split("/")[0]].depths
    for stage, depth in enumerate(depths):
        expected = last if stage == 3 else pair
        assert kinds_of_stage(model, stage) == [expected[i % 2] for i in range(depth)]


@pytest.mark.parametrize("size", [(32, 32), (33, 63), (40, 100), (225, 32)])
@pytest.mark.parametrize("attention", ["ecoformer", "msa", "lsa_msa", "lsa_gsa", "sra"])
def test_any_image_size_from_32_pixels(attention: str, size: Size) -> None:
    torch.manual_seed(0)
    hashing = HashConfig(num_bits=4, num_anchors=5, num_fit_steps=2)
    model = Twins(TINY_SVT, attention, num_classes=2, hashing=hashing)
    images = torch.randn(2, 3, *size)
    if attention == "ecoformer":
        fit_hash_functions(model, images)
    logits = model(images)
    assert logits.shape == (2, 2)
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    counted = [
        layer for layer in count_cost(model, size).layers if layer.kind.endswith("attention")
    ]
    assert len(counted) == sum(TINY_SVT.depths)
    assert all(layer.mul > 0 for layer in counted)


def test_smaller_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"4 x 1 is smaller than a patch; .* at least 32 pixels"):
        Twins(TINY_SVT, "msa")(torch.zeros(1, 3, 64, 31))


def test_cost_of_windows_and_of_spatial_reduction() -> None:
    model = build_empty(FAMILY, "alt_gvt_small/lsa_gsa")
    cost = {layer.name: layer for layer in count_cost(model, 224).layers}
    # A window is 7 x 7, and eight times fewer rows and columns of 56 are as many.
    num_pairs, dim, num_heads = 56 * 56 * 49, 64, 2
    for name in ("blocks.0.0.attn", "blocks.0.1.attn"):
        assert cost[name].add == 2 * num_pairs * dim
        assert cost[name].mul == (2 * dim + num_heads) * num_pairs


def test_drop_path_rises_over_all_blocks() -> None:
    model = Twins(TINY_SVT, "msa", drop_path_rate=0.7)
    rates = [
        getattr(b.drop_path, "drop_prob", 0.0) for stage in model.blocks for b in stage.children()
    ]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *(
            (f"ecoformer_twins_svt_{size}", f"alt_gvt_{size}")
            for size in ("small", "base", "large")
        ),
        *(
            (f"ecoformer_twins_pcpvt_{size}", f"pcpvt_{size}_v0")
            for size in ("small", "base", "large")
        ),
    ],
)
def test_timm_names(name: str, variant: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    expected = build_empty(FAMILY, f"{variant}/ecoformer", num_classes=10)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in expected.named_parameters()
    }


def test_maps_of_stages_for_dense_prediction() -> None:
    model: Any = timm.create_model("ecoformer_twins_svt_small", attention="msa", features_only=True)
    whole = twins.create_model("alt_gvt_small", "msa").eval()
    whole.load_state_dict({**whole.state_dict(), **model.model.state_dict()})
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        maps = model.eval()(images)
        last = whole.forward_features(images)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, 64 // reduction, 96 // reduction)
        for channels, reduction in zip(
            model.feature_info.channels(), model.feature_info.reduction(), strict=True
        )
    ]
    # The last one is normalised.
    torch.testing.assert_close(maps[-1], last, rtol=0, atol=0)


def test_the_default_attention_is_ecoformer() -> None:
    with torch.device("meta"):
        for variant in FAMILY.variants:
            assert kinds_of_stage(twins.create_model(variant), 0)[0] == "ecoformer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alt_gvt_smal",), "did you mean 'alt_gvt_small'"),
        # Its attention would be said twice.
        (("alt_gvt_small_ecoformer",), "did you mean 'alt_gvt_small'"),
        (("alt_gvt_small", "sra"), "has: ecoformer, msa, lsa_msa, lsa_gsa"),
        (("pcpvt_small_v0", "lsa_gsa"), "has: ecoformer, msa, sra"),
        (("alt_gvt_small", "performer"), "no attention kind 'performer'"),
    ],
)
def test_unknown_models_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        twins.create_model(*arguments)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alt_gvt_small", ("alt_gvt_small", "msa")),
        ("alt_gvt_large", ("alt_gvt_large", "msa")),
        ("alt_gvt_small_sra_to_msa", ("alt_gvt_small", "lsa_msa")),
        ("alt_gvt_base_ecoformer", ("alt_gvt_base", "ecoformer")),
        ("pcpvt_small_v0", ("pcpvt_small_v0", "sra")),
        ("pcpvt_large_v0_ecoformer", ("pcpvt_large_v0", "ecoformer")),
    ],
)
def test_released_model_names(name: str, expected: tuple[str, str]) -> None:
    assert FAMILY.resolve(name) == expected
    assert FAMILY.resolve(name, "msa") == (expected[0], "msa")


def test_unfitted_model_refuses() -> None:
    with pytest.raises(InputError, match="fit_hash_functions"):
        Twins(TINY_SVT, "ecoformer")(torch.zeros(1, 3, 32, 32))
