"""Weights that go from hand to hand by timm's means: folders, the hub, files."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import save_for_hf
from torch import Tensor

import pvt  # noqa: F401
import twins  # noqa: F401
from ecoformer import HashConfig, InputError, export_released, fit_hash_functions
from ecoformer.checkpoint import save_atomic
from ecoformer.hashing import hash_layers

B0, SVT = "ecoformer_pvt_v2_b0", "ecoformer_twins_svt_small"
STEM = "patch_embed1.proj.weight"


def create(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options)


def draw_images(count: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def shared() -> Any:
    """What somebody shares: B0 of seven classes, fitted."""
    torch.manual_seed(0)
    hashing = HashConfig(num_bits=4, num_anchors=6, num_similar=3, num_fit_steps=1)
    model = create(B0, num_classes=7, hashing=hashing).eval()
    fit_hash_functions(model, draw_images(8))
    return model


def make_from_folder(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    save_for_hf(model, str(folder))
    return f"local-dir:{folder}"


def make_from_hub(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which a hub serves the folder."""
    save_for_hf(model, str(folder), safe_serialization=True)

    def serve(repo_id: str, filename: str, **options: Any) -> str:
        assert (repo_id, options["revision"]) == ("somebody/model", "v2")
        if not (folder / filename).exists():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", serve)
    return "hf-hub:somebody/model@v2"


@pytest.mark.parametrize("share", [make_from_folder, make_from_hub])
def test_shared_models_come_back(
    share: Callable[..., str], shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, images = share(shared, tmp_path, monkeypatch), draw_images()
    with torch.no_grad():
        same = create(name, pretrained=True).eval()
        assert torch.equal(same(images), shared(images))
        # For another task the rest stays.
        pooled = shared.forward_head(shared.forward_features(images), pre_logits=True)
        other = create(name, pretrained=True, num_classes=3).eval()
        assert other(images).shape == (2, 3)
        assert torch.equal(other.forward_features(images), shared.forward_features(images))
        bare = create(name, pretrained=True, num_classes=0).eval()
        assert torch.equal(bare(images), pooled)
        features = create(name, pretrained=True, features_only=True, out_indices=(0, 2)).eval()
        _, maps = shared.forward_intermediates(images, (0, 2))
        torch.testing.assert_close(features(images), maps, rtol=0, atol=0)
        grey = create(name, pretrained=True, in_chans=1).eval()
        stem = shared.state_dict()[STEM]
        torch.testing.assert_close(grey.state_dict()[STEM], stem.sum(1, keepdim=True))
        assert grey(draw_images(channels=1)).shape == (2, 7)
    # Without weights, of the same sizes.
    fresh = create(name)
    assert next(iter(hash_layers(fresh).values())).config.num_bits == 4
    assert not next(iter(hash_layers(fresh).values())).is_fitted


def test_the_kind_and_channels_travel_along(tmp_path: Path) -> None:
    model = create(SVT, attention="lsa_gsa", num_classes=3, in_chans=1).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    images = draw_images(channels=1)
    same = create(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(same(images), model(images))
    # One channel becomes three, each with a third of its weight.
    coloured = create(f"local-dir:{tmp_path}", pretrained=True, in_chans=3).state_dict()
    stem = model.state_dict()["patch_embeds.0.proj.weight"]
    torch.testing.assert_close(coloured["patch_embeds.0.proj.weight"], stem.repeat(1, 3, 1, 1) / 3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["attention"] == "lsa_gsa"


def test_a_folder_without_weights_says_what_it_lacks(shared: Any, tmp_path: Path) -> None:
    save_for_hf(shared, str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"no weights there; expected model\.safetensors or pyt"):
        create(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("offline"), "it has no model.safetensors or pytorch_model.bin"),
        (OSError("no space\non the disk"), "no space"),
    ],
)
def test_a_hub_out_of_reach_is_one_line(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    with pytest.raises(InputError, match=rf"somebody/model: .*{reason}.*{{'file'") as caught:
        create(B0, pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "somebody/model"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_training_file", [False, True])
def test_timm_s_checkpoint_path_takes_released_files(
    is_training_file: bool, shared: Any, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pth"
    state: dict[str, Any] = dict(export_released(shared))
    if is_training_file:
        args = argparse.Namespace(nbits=4)
        state = {"model": state, "optimizer": {}, "epoch": 3, "args": args}
    torch.save(state, path)
    hashing = {"num_bits": 4, "num_anchors": 6}
    model = create(B0, num_classes=7, hashing=hashing, checkpoint_path=path).eval()
    images = draw_images()
    with torch.no_grad():
        assert torch.equal(model(images), shared(images))
    # As strict as ever.
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        create(B0, num_classes=3, hashing=hashing, checkpoint_path=path)


def test_timm_s_checkpoint_path_takes_ours(shared: Any, tmp_path: Path) -> None:
    save_atomic(shared.state_dict(), tmp_path / "fitted.pth")
    hashing = {"num_bits": 4, "num_anchors": 6}
    path = tmp_path / "fitted.pth"
    model = create(B0, num_classes=7, hashing=hashing, checkpoint_path=path).eval()
    with torch.no_grad():
        assert torch.equal(model(draw_images()), shared(draw_images()))


def test_random_hash_functions_serve_for_timing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = create(B0, hashing="random").eval()
    (record,) = caplog.records
    assert "hash functions are random" in record.getMessage()
    with torch.no_grad():
        assert model(draw_images()).isfinite().all()
    # The same in every process of a run.
    other = create(B0, hashing="random")
    for name, layer in hash_layers(model).items():
        assert torch.equal(layer.anchors, hash_layers(other)[name].anchors)


@pytest.mark.parametrize(
    ("hashing", "message"),
    [
        ("randon", "not 'randon'"),
        ({"bits": 8}, "unexpected keyword argument 'bits'"),
        (8, "not 8"),
        ({"num_bits": 0}, "num_bits must be at least 1"),
    ],
)
def test_other_settings_are_refused(hashing: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create(B0, hashing=hashing)
