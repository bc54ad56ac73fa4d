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
from ecoformer import InputError, export_released, load_checkpoint
from ecoformer.checkpoint import save_atomic
from ecoformer.checkpoint.zoo import ZOO
from ecoformer.hashing import with_random_hash_functions

NAMES = [f"ecoformer_{variant}" for variant in pvt.PVT_VARIANTS]


def create(name: str = "ecoformer_pvt_v2_b0", **keywords: Any) -> pvt.PyramidVisionTransformerV2:
    """A model, as timm makes it."""
    model = timm.create_model(name, **keywords)
    assert isinstance(model, pvt.PyramidVisionTransformerV2)
    return model


def test_models_are_listed() -> None:
    assert set(NAMES) <= set(timm.list_models("ecoformer_*"))
    assert set(NAMES) <= set(timm.list_models(module="pvt"))


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
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 2 * 3, 256)
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(pooled, tokens.mean(1))
    torch.testing.assert_close(model.forward_head(tokens), model(images))


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


def test_pretrained_weights_need_a_zoo_entry() -> None:
    with pytest.raises(InputError, match="ecoformer_pvt_v2_b5: no such file or zoo name, did you"):
        create("ecoformer_pvt_v2_b5", pretrained=True)


def test_no_name_of_timm_is_taken() -> None:
    assert (
        timm.create_model("pvt_v2_b0", num_classes=2).__class__.__module__ == "timm.models.pvt_v2"
    )
