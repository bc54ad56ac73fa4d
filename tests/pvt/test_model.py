"""PVTv2 against the released weights and logits, and as a citizen of timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pvt
from ecoformer import HashConfig, InputError, fit_hash_functions
from ecoformer.attention import attention_class
from ecoformer.hashing import hash_layers
from pvt import FAMILY
from tests.backbones import (
    assert_golden_logits,
    assert_norm_eps,
    assert_released_layout,
    build,
    build_empty,
    golden_rows,
)

ROWS = [f"{variant}/{kind}" for variant, kinds in FAMILY.variants.items() for kind in kinds]
B0_KINDS = FAMILY.variants["pvt_v2_b0"]
SMALL_HASH = HashConfig(num_bits=4, num_anchors=6, num_similar=3, num_fit_steps=1)


def stages_of(model: nn.Module) -> list[list[Any]]:
    """The blocks of each stage."""
    return [list(model.get_submodule(f"block{stage}").children()) for stage in (1, 2, 3, 4)]


@pytest.mark.parametrize("row", golden_rows(FAMILY, "logits.json"))
def test_logits(row: str) -> None:
    assert_golden_logits(FAMILY, row)


@pytest.mark.parametrize("row", golden_rows(FAMILY, "state_dicts.json"))
def test_released_names_and_shapes(row: str) -> None:
    assert_released_layout(FAMILY, row)


@pytest.mark.parametrize("row", [f"pvt_v2_b0/{kind}" for kind in B0_KINDS] + ["pvt_v2_b2_li/sra"])
def test_norm_eps(row: str) -> None:
    assert_norm_eps(build_empty(FAMILY, row))


@pytest.mark.parametrize("row", ROWS)
def test_each_stage_has_its_attention(row: str) -> None:
    kind = row.split("/")[1]
    *first, last = stages_of(build_empty(FAMILY, row))
    assert {type(block.attn) for stage in first for block in stage} == {attention_class(kind)}
    last_kind = "sra" if kind == "sra" else "msa"
    assert {type(block.attn) for block in last} == {attention_class(last_kind)}


def test_hash_buffers_are_named_and_shaped_as_promised() -> None:
    model = build_empty(FAMILY, "pvt_v2_b0/ecoformer", hashing=HashConfig(8, 20))
    state = {name: tuple(t.shape) for name, t in model.state_dict().items() if ".hash." in name}
    expected: dict[str, tuple[int, ...]] = {}
    for stage, (heads, dim) in enumerate([(1, 32), (2, 32), (5, 32)], start=1):
        for block in range(2):
            prefix = f"block{stage}.{block}.attn.hash."
            expected[f"{prefix}weight"] = (heads, 8, 20)
            expected[f"{prefix}kernel_mean"] = (heads, 20)
            expected[f"{prefix}anchors"] = (heads, 20, dim)
            expected[f"{prefix}is_fitted"] = ()
    assert state == expected


@pytest.mark.parametrize("size", [(75, 98), (32, 32), (64, 33)])
@pytest.mark.parametrize("kind", B0_KINDS)
def test_images_of_any_size(kind: str, size: tuple[int, int]) -> None:
    model = build(FAMILY, f"pvt_v2_b0/{kind}", num_classes=7, hashing=SMALL_HASH)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    if kind == "ecoformer":
        fit_hash_functions(model, images, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_gradients_reach_every_parameter() -> None:
    model = build(FAMILY, "pvt_v2_b0/ecoformer", num_classes=3, hashing=SMALL_HASH)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fit_hash_functions(model, images)
    model.train()(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_fit_reaches_three_stages_in_order() -> None:
    model = build(FAMILY, "pvt_v2_b0/ecoformer", hashing=SMALL_HASH)
    fits = fit_hash_functions(model, torch.randn(2, 3, 64, 64))
    names = [f"block{stage}.{block}.attn.hash" for stage in (1, 2, 3) for block in (0, 1)]
    assert list(fits) == list(hash_layers(model)) == names


def test_too_small_a_batch_names_layer_and_remedy() -> None:
    hashing = HashConfig(num_bits=2, num_anchors=25, num_fit_steps=1)
    model = build(FAMILY, "pvt_v2_b0/ecoformer", hashing=hashing)
    message = r"block3\.0\.attn\.hash: 1 images of 16 tokens .* 25 anchors; fit on at least 2"
    with pytest.raises(InputError, match=message):
        fit_hash_functions(model, torch.randn(1, 3, 64, 64))


def test_drop_path_rises_over_all_blocks() -> None:
    model = build_empty(FAMILY, "pvt_v2_b0/msa", drop_path_rate=0.7)
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0) for stage in stages_of(model) for block in stage
    ]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_dropout_is_in_attention_and_mlp() -> None:
    model = build_empty(FAMILY, "pvt_v2_b0/ecoformer", proj_drop_rate=0.25)
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    # timm's drop_rate.
    assert rates.pop("head_drop") == 0
    assert len(rates) == 2 * 8
    assert set(rates.values()) == {0.25}


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = pvt.create_model("pvt_v2_b1", "msa")
    linear = model.get_submodule("block4.0.mlp.fc1")
    assert isinstance(linear, nn.Linear)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert not linear.bias.any()
    for name, fan_out in (("patch_embed1.proj", 7 * 7 * 64), ("block3.0.mlp.dwconv.dwconv", 9)):
        convolution = model.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d)
        expected = (2 / fan_out) ** 0.5
        assert convolution.weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert convolution.bias is not None and not convolution.bias.any()


def test_the_seed_decides_the_weights() -> None:
    def first_weight(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return pvt.create_model("pvt_v2_b0").state_dict()["patch_embed1.proj.weight"]

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_the_default_attention_is_ecoformer() -> None:
    assert hash_layers(build_empty(FAMILY, "pvt_v2_b0/ecoformer")).keys() == (
        hash_layers(pvt.create_model("pvt_v2_b0")).keys()
    )


def test_images_of_other_channels() -> None:
    model = pvt.create_model("pvt_v2_b0", "sra", in_chans=1, num_classes=4)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pvt_v2_b7",), r"unknown pvt model 'pvt_v2_b7', did you mean 'pvt_v2_b"),
        (("pvt_v2_b0", "lsa_gsa"), "has: ecoformer, msa, msa_share_qk, sra, performer"),
        (("pvt_v2_b2_li", "ecoformer"), r"pvt_v2_b2_li has no .*'ecoformer'; it has: sra\."),
    ],
)
def test_what_does_not_exist_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pvt.create_model(*arguments)


def test_drop_path_is_a_probability() -> None:
    with pytest.raises(InputError, match="drop path"):
        pvt.create_model("pvt_v2_b0", drop_path_rate=1.0)
