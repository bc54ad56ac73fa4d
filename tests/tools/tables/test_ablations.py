"""Ablations: who takes part, from which weights, and that nothing is trained twice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ecoformer.config.file import read_config
from ecoformer.engine.logs import read_log
from ecoformer.errors import InputError
from ecoformer.models.registry import find_family
from ecoformer.tools.tables.ablations import list_arms
from ecoformer.tools.tables.command import main
from ecoformer.tools.tables.seeds import describe_curves
from tests.tools.tables.conftest import Refuse


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Fashion-MNIST of 16 images a split, of noise."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    random = np.random.RandomState(0)
    for prefix in ("train", "t10k"):
        for name, values, axes in (
            ("images-idx3", random.randint(0, 256, (16, 28, 28)), (16, 28, 28)),
            ("labels-idx1", np.arange(16) % 10, (16,)),
        ):
            header = bytes([0, 0, 8, len(axes)]) + np.array(axes, ">i4").tobytes()
            content = gzip.compress(header + values.astype(np.uint8).tobytes())
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(content)
    return folder


def test_kinds_are_those_of_the_backbone() -> None:
    kinds = [arm.attention for arm in list_arms("kinds", "pvt_v2_b0")]
    assert sorted(kinds) == [*("ecoformer", "ecoformer", "msa", "msa_share_qk", "performer", "sra")]
    assert kinds[0] == "msa"
    biases = [c.config.value_bias for c in list_arms("kinds", "alt_gvt_small")][-2:]
    assert biases == ["released", "normalized"]


def test_the_default_value_shares_its_runs() -> None:
    hashing = [arm.hashing for arm in list_arms("bits", "pvt_v2_b0")]
    assert {} in hashing
    assert {"num_bits": 16} not in hashing
    assert [c.config.num_anchors for c in list_arms("anchors", "pvt_v2_b0", ["7"])] == [7]


@pytest.mark.parametrize(
    ("ablation", "model", "value"),
    [
        ("bits", "pvt_v2_b0", "many"),
        ("bits", "pvt_v2_b0", "0"),
        ("bias", "pvt_v2_b0", "none"),
        ("kinds", "pvt_v2_b0", "msa"),
        ("pairs", "vit_canvas", "msa"),
        ("bits", "pvt_v2_b00", "8"),
    ],
)
def test_what_no_arm_can_be(ablation: str, model: str, value: str) -> None:
    with pytest.raises(InputError):
        list_arms(ablation, model, [value])


def test_the_last_epoch_of_each_seed_counts() -> None:
    row = describe_curves({0: [50.0, 81.0], 1: [51.0, 83.0]}, {0: [99.0, 80.0], 1: [99.0, 81.0]})
    assert (row["top1"], row["difference"], row["num_seeds"]) == (82, 1.5, 2)
    assert row["top1_by_epoch_seed1"] == "51.00 83.00"


def test_missing_data_stops_before_any_run(refuse: Refuse, tmp_path: Path) -> None:
    line = refuse("kinds", "--data-set", "FMNIST", "--data-path", str(tmp_path))
    assert "t10k-images" in line


def test_runs_share_stage_1_and_are_not_run_again(
    fashion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tables"
    command = [
        *("bias", "--data-set", "FMNIST", "--data-path", str(fashion), "--epochs", "1", "1"),
        *("--batch-size", "8", "--output-dir", str(folder)),
    ]
    assert main(command) == 0
    (seed,) = folder.glob("*/seed0")
    names = ["ecoformer", "ecoformer_value_bias_normalized", "msa_stage1"]
    assert sorted(run.name for run in seed.iterdir()) == names
    stage1 = seed / "msa_stage1" / "last_checkpoint.pth"
    for name in names[:2]:
        assert read_config(seed / name / "config.yaml").run.finetune == str(stage1)
    assert read_config(seed / names[1] / "config.yaml").hashing.value_bias == "normalized"

    rows = json.loads((folder / "bias.json").read_text())["rows"]
    for row, name in zip(rows, names, strict=False):
        assert row["top1"] == read_log(seed / name)[-1]["test_acc1"]
        assert (row["epochs"], row["num_seeds"]) == (2, 1)

    written = {name: (seed / name / "last_checkpoint.pth").stat().st_mtime_ns for name in names}
    assert main([*command, "--seeds", "0", "1"]) == 0
    again = {name: (seed / name / "last_checkpoint.pth").stat().st_mtime_ns for name in names}
    assert again == written
    rows = json.loads((folder / "bias.json").read_text())["rows"]
    assert [row["num_seeds"] for row in rows] == [2, 2]
    assert all("top1_ci95" in row for row in rows)
    assert ["difference_ci95" in row for row in rows] == [False, True]

    # Other settings in the same folder are another run: its own command refuses.
    capsys.readouterr()
    assert main([*command, "--batch-size", "4"]) == 2
    assert "belongs to a run with other settings" in capsys.readouterr().err


def test_pairs_compares_each_setting_once() -> None:
    arms = list_arms("pairs", "vit_canvas")
    assert arms[0].attention == "msa"
    assert {arm.attention for arm in arms} == set(find_family("vit_canvas").kinds("vit_canvas"))
    settings = [(arm.attention, arm.config, str(arm.fields)) for arm in arms]
    assert all(settings.count(one) == 1 for one in settings)
    hashed = [arm.config for arm in arms if arm.attention == "ecoformer"]
    assert {config.num_bits for config in hashed} == {4, 8, 16, 32}
    assert {config.num_anchors for config in hashed} == {5, 25, 50}
    assert {config.value_bias for config in hashed} == {"released", "normalized"}
    assert sum(arm.fields.get("distill") == "output" for arm in arms) == 1


def test_softmax_is_fitted_fine_tuned_and_distilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of PAIRS, by the network of PAIRS, on a few canvases."""
    monkeypatch.setattr("ecoformer.data.pairs.NUM_CANVASES", {"train": 32, "val": 16})
    folder = tmp_path / "tables"
    command = [
        *("conversion", "--model", "vit_canvas", "--data-set", "PAIRS", "--input-size", "32"),
        *("--batch-size", "16", "--epochs", "2", "2", "--seeds", "0", "--device", "cpu"),
    ]
    assert main([*command, "--output-dir", str(folder)]) == 0
    rows = json.loads((folder / "conversion.json").read_text())["rows"]
    names = ["softmax", "EcoFormer, fitted alone", "EcoFormer", "EcoFormer, distilled"]
    assert [row["name"] for row in rows] == names
    assert [row["epochs"] for row in rows] == [4, 3, 4, 4]

    runs = {run.name: run for run in next(folder.glob("*/seed0")).iterdir()}
    stage1 = runs.pop("msa_stage1") / "last_checkpoint.pth"
    weights = {
        name: load_file(run / "last_checkpoint.pth", "head.weight") for name, run in runs.items()
    }
    (fitted,) = (name for name in runs if "lr_0.0" in name)
    before = load_file(stage1, "head.weight")
    # Nothing but the hash functions was learned there, and all else elsewhere.
    assert [name for name, weight in weights.items() if weight.equal(before)] == [fitted]
    distilled = read_config(runs["ecoformer_distill_output"] / "config.yaml")
    assert (distilled.distillation.distill, distilled.distillation.teacher) == (
        "output",
        str(stage1),
    )
    plain = read_config(runs["ecoformer"] / "config.yaml")
    assert (plain.optim.opt, plain.distillation.teacher) == ("muon", None)
    first = read_config(stage1.parent / "config.yaml")
    assert plain.optim.lr == first.optim.lr / 4 == 8e-3


def load_file(path: Path, name: str) -> Tensor:
    entry: Tensor = torch.load(path, weights_only=True)["model"][name]
    return entry
