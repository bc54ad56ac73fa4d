"""Accuracy in the main table: evaluated once, from the right weights, or refused in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pvt
from ecoformer.checkpoint import zoo
from ecoformer.checkpoint.zoo import ZOO
from ecoformer.tools.table import Value
from ecoformer.tools.tables import accuracy
from ecoformer.tools.tables.accuracy import Validation, evaluate_models
from tests.tools.tables.conftest import Refuse

ROW = "pvt_v2_b0/msa"


def save_model(path: Path, attention: str = "msa", *, num_classes: int = 2, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = pvt.create_model("pvt_v2_b0", attention, num_classes=num_classes)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def evaluate_one(image_folder: Path, tmp_path: Path) -> Callable[[Path], dict[str, Value]]:
    """Evaluate one row from weights, at a small size, recorded in one file."""

    def run(weights: Path) -> dict[str, Value]:
        validation = Validation("IMNET", str(image_folder), 8, torch.device("cpu"), input_size=32)
        return evaluate_models({ROW: str(weights)}, validation, tmp_path / "accuracy.csv")[ROW]

    return run


def count_evaluations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []
    real = accuracy.evaluate

    def evaluate(*args: object, **keywords: object) -> object:
        calls.append(args)
        return real(*args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(accuracy, "evaluate", evaluate)
    return calls


def test_an_evaluated_row_is_not_evaluated_again(
    evaluate_one: Callable[[Path], dict[str, Value]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = count_evaluations(monkeypatch)
    weights = save_model(tmp_path / "w.pth")
    first = evaluate_one(weights)
    assert len(calls) == 1
    assert 0 <= float(first["top1"] or 0) <= 100
    assert evaluate_one(weights) == first
    assert len(calls) == 1
    # Other weights under the old name are other weights; the old ones are not forgotten.
    evaluate_one(save_model(weights, seed=1))
    assert len(calls) == 2
    assert evaluate_one(save_model(weights)) == first
    assert len(calls) == 2


def test_accuracy_is_that_of_the_engine(
    evaluate_one: Callable[[Path], dict[str, Value]],
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pvt.main import main

    weights = save_model(tmp_path / "w.pth")
    row = evaluate_one(weights)
    capsys.readouterr()
    words = ["--model", "pvt_v2_b0", "--attn_type", "msa", "--resume", str(weights), "--eval"]
    size = ["--input-size", "32", "--batch-size", "8", "--num_workers", "0", "--device", "cpu"]
    assert main([*words, *size, "--data-path", str(image_folder)]) == 0
    (top1,) = re.findall(r"top-1 ([\d.]+) %", capsys.readouterr().out)
    assert f"{row['top1']:.2f}" == top1


def test_no_val_folder(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    line = refuse("main", "--data-path", str(tmp_path / "data"))
    assert "no folder val/" in line


def test_weights_without_data(refuse: Refuse) -> None:
    assert "--data-path" in refuse("main", "--weights", f"{ROW}=w.pth")


@pytest.mark.parametrize("text", ["pvt_v2_b0/mas=w.pth", "pvt_v2_b0/ms"])
def test_weights_of_no_row(refuse: Refuse, image_folder: Path, text: str) -> None:
    line = refuse("main", "--data-path", str(image_folder), "--weights", text)
    assert f"did you mean '{ROW}'" in line


def test_unknown_zoo_name(refuse: Refuse, image_folder: Path) -> None:
    weights = f"{ROW}=ecoformer_pvt_v2_b00"
    line = refuse("main", "--data-path", str(image_folder), "--weights", weights)
    assert "did you mean 'ecoformer_pvt_v2_b0'" in line


def test_weights_of_another_model(refuse: Refuse, image_folder: Path, tmp_path: Path) -> None:
    weights = save_model(tmp_path / "w.pth", "sra")
    line = refuse("main", "--data-path", str(image_folder), "--weights", f"{ROW}={weights}")
    assert str(weights) in line
    assert "another model" in line


def test_weights_with_nan(refuse: Refuse, image_folder: Path, tmp_path: Path) -> None:
    weights = save_model(tmp_path / "w.pth")
    state = torch.load(weights, weights_only=True)
    state["norm4.weight"][3] = float("nan")
    torch.save(state, weights)
    line = refuse("main", "--data-path", str(image_folder), "--weights", f"{ROW}={weights}")
    assert "norm4.weight holds NaN" in line


def test_a_zoo_file_with_a_wrong_checksum(
    refuse: Refuse, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name, checksum = "ecoformer_pvt_v2_b0", "0" * 64
    monkeypatch.setitem(zoo.ZOO, name, replace(ZOO[name], sha256=checksum))
    cached = tmp_path / "checkpoints" / "pvtv2_b0_ecoformer.pth"
    cached.parent.mkdir()
    save_model(cached, "ecoformer")
    line = refuse("main", "--data-path", str(image_folder))
    assert str(cached) in line
    assert checksum in line
