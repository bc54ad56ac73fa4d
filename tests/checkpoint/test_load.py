"""Loading into a model: conversions entry by entry, what the report says, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

import pvt
from ecoformer.checkpoint import load_checkpoint
from ecoformer.checkpoint.layout import to_ours
from ecoformer.errors import InputError
from ecoformer.hashing import hash_layers
from ecoformer.models.sizes import PyramidSizes
from pvt.model import PyramidVisionTransformerV2
from pvt.variants import PVT_VARIANTS
from tests.checkpoint.weights import released_shapes, small_state
from twins.model import Twins
from twins.variants import TWINS_VARIANTS

Sizes = TypeVar("Sizes", bound=PyramidSizes)

# What the weights of a kind of attention can become.
STAGES = {
    "sra": ("msa", "msa_share_qk", "ecoformer"),
    "lsa_gsa": ("msa", "lsa_msa", "ecoformer"),
    "msa": ("msa_share_qk", "ecoformer"),
    "lsa_msa": ("ecoformer",),
}
CONVERSIONS = [
    (row, f"{row.split('/')[0]}/{kind}")
    for row in sorted(released_shapes())
    for kind in STAGES.get(row.split("/")[1], ())
    if f"{row.split('/')[0]}/{kind}" in released_shapes()
]


def shrink(sizes: Sizes) -> Sizes:
    return replace(sizes, embed_dims=tuple(dim // 32 for dim in sizes.embed_dims))


def make_small(row: str) -> nn.Module:
    """A model with the shapes of ``small_state``, -7 everywhere and nothing fitted."""
    variant, kind = row.split("/")
    model: nn.Module
    if variant in PVT_VARIANTS:
        model = PyramidVisionTransformerV2(shrink(PVT_VARIANTS[variant]), kind)
    else:
        model = Twins(shrink(TWINS_VARIANTS[variant]), kind)
    for layer in hash_layers(model).values():
        # Hash functions keep their width there.
        layer.anchors = layer.anchors.new_zeros(*layer.anchors.shape[:2], 32)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(-7)
    return model


def make_pair(earlier: str, later: str) -> tuple[Mapping[str, Tensor], nn.Module]:
    """Weights of one row, and a model of another."""
    return small_state(earlier), make_small(later)


def convert_by_hand(name: str, source: Mapping[str, Tensor]) -> Tensor:
    """The value that one entry has to take, told in the words of the three stages."""
    if name in source:
        return source[name]
    layer, part, leaf = name.rsplit(".", 2)
    if f"{layer}.qkv.{leaf}" in source:
        qkv = source[f"{layer}.qkv.{leaf}"]
    else:
        qkv = torch.cat([source[f"{layer}.q.{leaf}"], source[f"{layer}.kv.{leaf}"]])
    width = qkv.shape[0] // 3
    return {"qkv": qkv, "to_qk": qkv[:width], "to_v": qkv[2 * width :]}[part]


@pytest.mark.parametrize(("earlier", "later"), CONVERSIONS)
def test_conversion_entry_by_entry(earlier: str, later: str) -> None:
    source, model = make_pair(earlier, later)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_checkpoint(model, source)

    after = model.state_dict()
    hashes = {name for name in after if ".hash." in name}
    for name, tensor in after.items():
        expected = before[name] if name in hashes else convert_by_hand(name, source)
        assert torch.equal(tensor, expected), name

    assert {*report.loaded, *report.derived} == after.keys() - hashes
    assert set(report.loaded) == source.keys() & after.keys()
    assert (report.missing, report.unused) == ((), ())
    reductions = {name for name in source if re.search(r"attn\.(sr|norm)\.", name)}
    num_values = sum(".to_v." in name for name in report.derived)
    assert {name for name in report.dropped if not name.endswith("[k]")} == reductions
    assert sum(name.endswith("[k]") for name in report.dropped) == num_values
    assert len(set(report.dropped)) == len(report.dropped)


def test_performer_takes_qkv_and_keeps_its_own_features() -> None:
    source = pvt.create_model("pvt_v2_b0", "msa").state_dict()
    model = pvt.create_model("pvt_v2_b0", "performer")
    features = "block1.0.attn.fast_attention.projection_matrix"
    before = model.state_dict()[features].clone()
    report = load_checkpoint(model, source)
    assert set(report.loaded) == set(source)
    assert (report.missing, report.unused, report.derived) == ((), (), ())
    assert torch.equal(model.state_dict()[features], before)


def test_performer_takes_original_weights_by_way_of_softmax() -> None:
    source = pvt.create_model("pvt_v2_b0", "sra").state_dict()
    softmax, performer = (pvt.create_model("pvt_v2_b0", kind) for kind in ("msa", "performer"))
    expected, report = load_checkpoint(softmax, source), load_checkpoint(performer, source)
    assert (report.derived, report.dropped) == (expected.derived, expected.dropped)
    for name, tensor in softmax.state_dict().items():
        assert torch.equal(performer.state_dict()[name], tensor), name


def test_half_precision_is_cast_by_copy() -> None:
    source, model = make_pair("pvt_v2_b0/ecoformer", "pvt_v2_b0/ecoformer")
    halves = {name: tensor.half() for name, tensor in source.items()}
    load_checkpoint(model, halves, strict=True)
    for name, tensor in to_ours(halves).items():
        loaded = model.state_dict()[name]
        assert loaded.dtype is (torch.bool if name.endswith("is_fitted") else torch.float32)
        assert torch.equal(loaded, tensor.to(loaded.dtype))
        assert loaded.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("num_classes", [10, None])
def test_other_head_stays_fresh_and_is_said(num_classes: int | None) -> None:
    source, model = make_pair("pvt_v2_b0/msa", "pvt_v2_b0/msa")
    changed = {name: t for name, t in source.items() if not name.startswith("head.")}
    if num_classes:
        changed["head.weight"] = torch.ones(num_classes, source["head.weight"].shape[1])
        changed["head.bias"] = torch.ones(num_classes)
    report = load_checkpoint(model, changed)
    assert report.missing == ("head.weight", "head.bias")
    assert report.dropped == (report.missing if num_classes else ())
    assert model.state_dict()["head.bias"].eq(-7).all()
    assert "head" in str(report)
    assert f"{num_classes} classes in the file, 1000 in the model" in str(report) or not num_classes

    with pytest.raises(InputError, match=r"10 classes in the file, 1000 in the model|head.weight"):
        load_checkpoint(model, changed, strict=True)


def test_missing_backbone_weight_is_refused_unless_asked_for() -> None:
    source, model = make_pair("pvt_v2_b0/msa", "pvt_v2_b0/msa")
    part = dict(source)
    del part["block3.1.mlp.fc1.weight"]
    with pytest.raises(InputError, match=r"1 of .* no source, first block3\.1\.mlp\.fc1\.weight"):
        load_checkpoint(model, part)
    assert model.state_dict()["norm4.weight"].eq(-7).all(), "a refused file changes nothing"
    assert load_checkpoint(model, part, allow_missing=True).missing == ("block3.1.mlp.fc1.weight",)
    with pytest.raises(InputError, match="not both"):
        load_checkpoint(model, part, allow_missing=True, strict=True)
    with pytest.raises(InputError, match="no source"):
        load_checkpoint(model, {"conv1.weight": torch.ones(3)}, allow_missing=True)


def test_unused_entries_are_reported_and_refused_where_strict() -> None:
    source, model = make_pair("pvt_v2_b0/msa", "pvt_v2_b0/msa")
    more = {**source, "aux_head.weight": torch.ones(3)}
    report = load_checkpoint(model, more)
    assert report.unused == ("aux_head.weight",)
    assert "1 unused (aux_head)" in str(report)
    with pytest.raises(InputError, match=r"1 of the file's fit nowhere, first aux_head\.weight"):
        load_checkpoint(model, more, strict=True)


@pytest.mark.parametrize(
    ("file", "model", "message"),
    [
        ("pvt_v2_b1/msa", "pvt_v2_b0/msa", r"head.weight: \[1000, 16\] in the file, \[1000, 8\]"),
        ("pvt_v2_b2/msa", "pvt_v2_b1/msa", "fit nowhere, first block1.2"),
        ("alt_gvt_small/msa", "pvt_v2_b0/msa", "first patch_embed1.proj.weight"),
        ("pvt_v2_b0/ecoformer", "pvt_v2_b0/msa", "no source, first block1.0.attn.qkv.weight"),
        ("pvt_v2_b0/msa", "pvt_v2_b0/sra", "no source, first block1.0.attn.q.weight"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_another_architecture_is_one_line(
    file: str, model: str, message: str, strict: bool
) -> None:
    source, target = make_pair(file, model)
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(target, source, strict=strict, origin="stage1.pth")
    assert re.fullmatch(r"stage1\.pth: .*--model, --attn_type.*\.", str(caught.value))
    assert all(tensor.eq(-7).all() for tensor in target.state_dict().values() if tensor.ndim)


def test_a_kind_that_was_not_made_of_another_does_not_take_its_weights() -> None:
    # Projections of the same names, which the hash functions belong to.
    source, model = make_pair("pvt_v2_b0/ecoformer", "pvt_v2_b0/msa_share_qk")
    with pytest.raises(InputError, match=r"fit nowhere, first block1\.0\.attn\.hash\.weight"):
        load_checkpoint(model, source)
    performer = pvt.create_model("pvt_v2_b0", "performer").state_dict()
    with pytest.raises(InputError, match=r"attn\.fast_attention\.projection_matrix"):
        load_checkpoint(pvt.create_model("pvt_v2_b0", "msa"), performer)


@pytest.mark.parametrize("stage", ["msa", "sra", "msa_share_qk"])
def test_strict_converts_nothing(stage: str) -> None:
    source, model = make_pair(f"pvt_v2_b0/{stage}", "pvt_v2_b0/ecoformer")
    with pytest.raises(InputError, match="--finetune"):
        load_checkpoint(model, source, strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_hash_functions_of_other_size_name_the_flags(strict: bool) -> None:
    source, model = make_pair("pvt_v2_b0/ecoformer", "pvt_v2_b0/ecoformer")
    other = {name: t[:, :8] if name.endswith("ksh.A") else t for name, t in source.items()}
    with pytest.raises(
        InputError, match=r"8 bits and 25 anchors.*16 and 25.*--nbits 8 --anchor 25"
    ):
        load_checkpoint(model, other, strict=strict)


def test_head_of_another_rank_is_no_other_head() -> None:
    source, model = make_pair("pvt_v2_b0/msa", "pvt_v2_b0/msa")
    for strict in (False, True):
        with pytest.raises(InputError, match=r"head\.bias: \[\] in the file"):
            load_checkpoint(model, {**source, "head.bias": torch.tensor(0.0)}, strict=strict)


def test_half_a_hash_function_is_refused() -> None:
    source, model = make_pair("pvt_v2_b0/ecoformer", "pvt_v2_b0/ecoformer")
    part = dict(source)
    del part["block2.1.attn.fast_attention.ksh.mvec"]
    with pytest.raises(InputError, match=r"block2\.1\.attn\.hash\.kernel_mean"):
        load_checkpoint(model, part)


def test_unsound_values_are_refused() -> None:
    source, model = make_pair("pvt_v2_b0/msa", "pvt_v2_b0/msa")
    for value in (float("nan"), float("inf")):
        bad = {**source, "norm4.bias": torch.full_like(source["norm4.bias"], value)}
        with pytest.raises(InputError, match=r"norm4\.bias holds NaN or infinity"):
            load_checkpoint(model, bad)
    bad = {**source, "norm4.bias": source["norm4.bias"].int()}
    with pytest.raises(InputError, match=r"norm4\.bias is torch\.int32, expected torch\.float32"):
        load_checkpoint(model, bad)
    assert model.state_dict()["norm4.bias"].eq(-7).all()


def test_report_reads_as_sentences() -> None:
    source, model = make_pair("pvt_v2_b0/sra", "pvt_v2_b0/ecoformer")
    text = str(load_checkpoint(model, source, origin="pvt_v2_b0.pth"))
    assert text == (
        "pvt_v2_b0.pth: 122 entries loaded by name, 28 derived (attn.to_qk, attn.to_v, attn.qkv), "
        "36 dropped by rule (attn.kv[k], attn.sr, attn.norm). "
        "6 of 6 hash functions are not fitted yet."
    )
