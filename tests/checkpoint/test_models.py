"""Real models and files of released weights: in every form, and the way back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

import pvt
import twins
from ecoformer.checkpoint import export_released, load_checkpoint, save_atomic
from ecoformer.errors import InputError
from ecoformer.models.registry import ModelFamily
from ecoformer.tools.convert import convert
from tests.checkpoint.weights import fill_state, released_shapes
from tests.golden.fill import images

B0 = "pvt_v2_b0/ecoformer"


@pytest.mark.parametrize(
    ("family", "row"),
    [
        (pvt.FAMILY, B0),
        (pvt.FAMILY, "pvt_v2_b0/msa_share_qk"),
        (pvt.FAMILY, "pvt_v2_b0/sra"),
        (twins.FAMILY, "alt_gvt_small/ecoformer"),
        (twins.FAMILY, "pcpvt_small_v0/ecoformer"),
    ],
)
def test_released_weights_come_out_as_they_went_in(family: ModelFamily, row: str) -> None:
    released = fill_state(released_shapes()[row])
    model = family.create_model(*row.split("/"))
    report = load_checkpoint(model, released, strict=True)
    assert (report.derived, report.missing, report.unused) == ((), (), ())
    exported = export_released(model)
    assert exported.keys() == released.keys()
    for name, tensor in released.items():
        expected = tensor * 0 if name.endswith("projection_matrix") else tensor
        assert torch.equal(exported[name], expected), name


@pytest.fixture(scope="module")
def b0_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PVTv2-B0's weights, filled by name, in the forms that users hold."""
    folder = tmp_path_factory.mktemp("b0")
    state = fill_state(released_shapes()[B0])
    files = {
        "bare": folder / "bare.pth",
        "training": folder / "training.pth",
        "legacy": folder / "legacy.pth",
        "safetensors": folder / "ours.safetensors",
        "back": folder / "back.pth",
    }
    save_atomic(state, files["bare"])
    arguments = argparse.Namespace(model="pvt_v2_b0", batch_size=32, lr=5e-5)
    rest = {"optimizer": {}, "lr_scheduler": {}, "epoch": 29, "scaler": {}, "args": arguments}
    save_atomic({"model": state, **rest}, files["training"])
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(wrapped, files["legacy"], _use_new_zipfile_serialization=False)
    convert(str(files["bare"]), files["safetensors"])
    convert(str(files["safetensors"]), files["back"], is_released=True)
    return files


@pytest.mark.parametrize("form", ["bare", "training", "legacy", "safetensors", "back"])
def test_each_form_gives_the_released_logits(
    form: str, b0_files: dict[str, Path], golden_dir: Path
) -> None:
    golden = json.loads((golden_dir / "logits.json").read_text())[B0]
    model = pvt.create_model("pvt_v2_b0").eval()
    report = load_checkpoint(model, b0_files[form], strict=True)
    assert ["Nothing vouches" in note for note in report.notes] == [True] * (form == "legacy")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(flag for name, flag in before.items() if name.endswith("is_fitted"))
    with torch.inference_mode():
        logits = model(torch.from_numpy(images(golden["seed"], tuple(golden["input"]))))
    torch.testing.assert_close(logits, torch.tensor(golden["logits"]), rtol=0, atol=2e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_earlier_stage_leaves_the_hash_functions_to_be_fitted() -> None:
    source = pvt.create_model("pvt_v2_b0", "sra", num_classes=10)
    model = pvt.create_model("pvt_v2_b0", num_classes=5).eval()
    report = load_checkpoint(model, source.state_dict())
    assert "6 of 6 hash functions are not fitted yet" in str(report)
    assert "10 classes in the file, 5 in the model" in str(report)
    with pytest.raises(InputError, match="not fitted"):
        model(torch.zeros(1, 3, 32, 32))


def test_export_copies_and_refuses_what_is_not_fitted() -> None:
    model = pvt.create_model("pvt_v2_b0", "msa", num_classes=3)
    exported = export_released(model)
    exported["head.bias"] += 1
    assert not torch.equal(exported["head.bias"], model.state_dict()["head.bias"])

    with pytest.raises(InputError, match="fit_hash_functions"):
        export_released(pvt.create_model("pvt_v2_b0", num_classes=3))
