"""What timm's users do with a model: create, list, configure, change the classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config

import pvt
import twins
from ecoformer import InputError, export_released, load_checkpoint
from ecoformer.checkpoint import save_atomic
from ecoformer.checkpoint.zoo import ZOO
from ecoformer.hashing import with_random_hash_functions
from pvt.model import PyramidVisionTransformerV2

NAMES = [f"ecoformer_{variant}" for variant in pvt.PVT_VARIANTS]
STEM = "patch_embed1.proj.weight"


def create(name: str = "ecoformer_pvt_v2_b0", **keywords: Any) -> PyramidVisionTransformerV2:
    """A model, as timm makes it."""
    model = timm.create_model(name, **keywords)
    assert isinstance(model, PyramidVisionTransformerV2)
    return model


def stem_of(model: torch.nn.Module) -> torch.Tensor:
    """The weights that meet the image."""
    return model.state_dict()[STEM]


def test_models_are_listed() -> None:
    assert set(NAMES) <= set(timm.list_models("ecoformer_*"))
    assert set(NAMES) == set(timm.list_models(module="ecoformer_pvt"))


def test_modules_of_timm_list_its_own_models_alone() -> None:
    for module in ("pvt", "pvt_v2", "twins"):
        assert not [name for name in timm.list_models(module=module) if "ecoformer" in name]
    assert len(timm.list_models(module="ecoformer_twins")) == len(twins.FAMILY.timm_names)


def test_no_name_is_added_to_the_package() -> None:
    assert pvt.__all__ == ["FAMILY", "PVT_VARIANTS", "create_model"]


@pytest.mark.parametrize("name", NAMES)
def test_each_name_builds_its_variant(name: str) -> None:
    variant = name.removeprefix("ecoformer_")
    with torch.device("meta"):
        model, expected = create(name), pvt.create_model(variant, pvt.FAMILY.variants[variant][0])
    assert [p.shape for p in model.parameters()] == [p.shape for p in expected.parameters()]


def test_keywords_reach_the_model() -> None:
    model = create(num_classes=7, attention="msa", drop_path_rate=0.1, in_chans=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["head.weight"] == (7, 256)
    assert shapes["block1.0.attn.qkv.weight"] == (96, 32)
    assert shapes["patch_embed1.proj.weight"] == (32, 1, 7, 7)


def test_the_data_configuration_resolves() -> None:
    config = resolve_model_data_config(create())
    assert config["input_size"] == (3, 224, 224)
    assert config["interpolation"] == "bicubic"
    assert config["crop_pct"] == 0.875
    assert config["mean"] == (0.485, 0.456, 0.406)
    transform = create_transform(**config, is_training=False)
    resize, crop = transform.transforms[:2]
    assert (resize.size, tuple(crop.size)) == (256, (224, 224))


def test_the_classifier_can_be_changed() -> None:
    model = create(attention="msa", num_classes=7)
    images = torch.zeros(2, 3, 32, 32)
    assert model(images).shape == (2, 7)
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert (model(images).shape, model.num_classes) == ((2, 3), 3)
    model.reset_classifier(0)
    assert (model(images).shape, model.num_classes) == ((2, 256), 0)
    assert not list(model.get_classifier().parameters())


def test_features_are_the_steps_of_a_forward() -> None:
    model = create(attention="sra", num_classes=7).eval()
    assert model.num_features == 256
    images = torch.randn(2, 3, 64, 96)
    features = model.forward_features(images)
    assert features.shape == (2, 256, 2, 3)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model.forward_head(features), model(images))


@pytest.fixture
def cached_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The released file of PVTv2-B0, as it would lie in the cache, with weights of our own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = with_random_hash_functions(pvt.create_model("pvt_v2_b0", num_classes=1000))
    path = tmp_path / "checkpoints" / Path(urlsplit(ZOO["ecoformer_pvt_v2_b0"].url).path).name
    save_atomic(export_released(model), path)
    return path


def test_pretrained_weights_come_from_the_zoo(cached_weights: Path) -> None:
    expected = pvt.create_model("pvt_v2_b0")
    load_checkpoint(expected, cached_weights)
    state = create(pretrained=True).state_dict()
    torch.testing.assert_close(state, expected.state_dict(), rtol=0, atol=0)
    assert state["block1.0.attn.hash.is_fitted"]


def test_pretrained_weights_take_another_head(cached_weights: Path) -> None:
    state = create(pretrained=True, num_classes=7).state_dict()
    assert state["head.weight"].shape == (7, 256)
    released = torch.load(cached_weights, weights_only=True)
    torch.testing.assert_close(state["norm4.weight"], released["norm4.weight"], rtol=0, atol=0)


def test_a_fresh_head_is_said(
    cached_weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = torch.load(cached_weights, weights_only=True)
    few = {**state, "head.weight": torch.zeros(10, 256), "head.bias": torch.zeros(10)}
    create(pretrained=True, pretrained_cfg_overlay={"state_dict": few})
    assert "The head is fresh: 10 classes in the file, 1000 in the model" in caplog.text


def test_pretrained_weights_serve_features_without_a_head(cached_weights: Path) -> None:
    model = create(pretrained=True, num_classes=0)
    released = torch.load(cached_weights, weights_only=True)
    assert torch.equal(model.state_dict()["norm4.weight"], released["norm4.weight"])


def test_weights_come_from_where_timm_is_told(cached_weights: Path, tmp_path: Path) -> None:
    moved = cached_weights.rename(tmp_path / cached_weights.name)
    state = torch.load(moved, weights_only=True)
    wheres: list[dict[str, Any]] = [
        {"cache_dir": str(tmp_path)},
        {"pretrained_cfg_overlay": {"file": str(moved)}},
        {"pretrained_cfg": {"file": str(moved), "num_classes": 1000}},
        {"pretrained_cfg_overlay": {"state_dict": state}},
        {"pretrained_cfg_overlay": {"file": str(moved), "hf_hub_id": "someone/model"}},
        {"pretrained_cfg_overlay": {"state_dict": state, "hf_hub_id": "someone/model"}},
    ]
    for where in wheres:
        assert torch.equal(stem_of(create(pretrained=True, **where)), state[STEM])
    assert not list(cached_weights.parent.iterdir())


def test_pretrained_weights_take_images_of_other_channels(cached_weights: Path) -> None:
    stem = torch.load(cached_weights, weights_only=True)[STEM]
    grey = stem_of(create(pretrained=True, in_chans=1))
    torch.testing.assert_close(grey, stem.sum(1, keepdim=True))
    many = stem_of(create(pretrained=True, in_chans=6))
    torch.testing.assert_close(many, torch.cat([stem, stem], dim=1) / 2)


def test_weights_for_another_attention_are_refused(cached_weights: Path) -> None:
    with pytest.raises(InputError, match=r"pvtv2_b0_ecoformer\.pth: weights of another model"):
        create(pretrained=True, attention="msa")
    with pytest.raises(InputError, match=r"pvtv2_b0_ecoformer\.pth: .*attn\.hash\.weight"):
        create(pretrained=True, attention="msa_share_qk")


def test_models_with_weights_are_listed() -> None:
    with_weights = [name for name in ZOO if name.startswith("ecoformer_pvt")]
    assert timm.list_models("ecoformer_pvt*", pretrained=True) == with_weights


def test_weights_of_the_hub_are_not_mistaken_for_the_zoo_s(monkeypatch: pytest.MonkeyPatch) -> None:
    # Or the library would try for most of a minute to reach the hub.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"someone/model: .*pretrained_cfg_overlay"):
        create(pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "someone/model"})


@pytest.mark.parametrize(
    ("indices", "sides", "widths"),
    [
        (None, [16, 8, 4, 2], [32, 64, 160, 256]),
        ((0, 2), [16, 4], [32, 160]),
        ((-1,), [2], [256]),
    ],
)
def test_maps_of_stages_for_dense_prediction(
    indices: tuple[int, ...] | None, sides: list[int], widths: list[int], cached_weights: Path
) -> None:
    chosen: dict[str, Any] = {} if indices is None else {"out_indices": indices}
    model: Any = timm.create_model(
        "ecoformer_pvt_v2_b0", features_only=True, pretrained=True, **chosen
    ).eval()
    assert model.feature_info.channels() == widths
    assert model.feature_info.reduction() == [64 // side for side in sides]
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        maps = model(images)
        whole = create(pretrained=True).eval()
        last, same = whole.forward_intermediates(images, indices)
        assert torch.equal(last, whole.forward_features(images))
    assert [tuple(m.shape) for m in maps] == [
        (2, width, side, side) for width, side in zip(widths, sides, strict=True)
    ]
    assert all(torch.equal(one, other) for one, other in zip(maps, same, strict=True))
    is_last_among_them = maps[-1].shape[1] == 256
    assert torch.equal(maps[-1], last) == is_last_among_them


def test_maps_are_of_the_last_stages_where_a_number_is_given() -> None:
    model = create(attention="sra").eval()
    images = torch.randn(1, 3, 32, 32)
    last = model.forward_intermediates(images, 2, intermediates_only=True)
    assert isinstance(last, list)
    assert [m.shape[1] for m in last] == [160, 256]
    with pytest.raises(InputError, match="NCHW"):
        model.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("indices", [0, 5, [], [4], [-5]])
def test_stages_that_there_are_not_are_refused(indices: int | list[int]) -> None:
    model = pvt.create_model("pvt_v2_b0", "msa")
    with pytest.raises(InputError, match="those of 4 stages"):
        model.forward_intermediates(torch.zeros(1, 3, 32, 32), indices)


def test_pretrained_weights_need_a_zoo_entry() -> None:
    with pytest.raises(InputError, match="ecoformer_pvt_v2_b5: no such file or zoo name, did you"):
        create("ecoformer_pvt_v2_b5", pretrained=True)


def test_no_name_of_timm_is_taken() -> None:
    assert (
        timm.create_model("pvt_v2_b0", num_classes=2).__class__.__module__ == "timm.models.pvt_v2"
    )
