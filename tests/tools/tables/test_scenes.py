"""SCENES: a classifier a seed, a softmax network of each task, and both kinds made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecoformer.config.file import read_config
from ecoformer.engine.logs import read_log
from ecoformer.tools.tables import scenes
from ecoformer.tools.tables.command import main
from tests.tools.tables.conftest import Refuse


def test_both_kinds_of_a_task_go_on_from_one_softmax_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecoformer.data.scenes.NUM_CANVASES", {"train": 4, "val": 3})
    monkeypatch.setattr(
        scenes, "_CLASSIFIER", {**scenes._CLASSIFIER, "epochs": 1, "epoch_samples": 32}
    )
    command = [
        *("scenes", "--short-side", "96", "--batch-size", "2", "--epochs", "2", "1"),
        *("--steps", "1", "--seeds", "0", "--device", "cpu", "--output-dir", str(tmp_path)),
    ]
    assert main(command) == 0
    runs = {run.name: run for run in (tmp_path / "scenes" / "seed0").iterdir()}
    tasks = ("detection", "segmentation")
    kinds = ("stage1", "msa", "ecoformer")
    assert set(runs) == {"classifier", *(f"{task}_{kind}" for task in tasks for kind in kinds)}
    for task in tasks:
        first, *others = (read_config(runs[f"{task}_{kind}"] / "config.yaml") for kind in kinds)
        assert str(first.run.finetune) == str(runs["classifier"] / "last_checkpoint.pth")
        assert (first.optim.epochs, first.data.epoch_samples) == (2, 2)
        for config in others:
            assert str(config.run.finetune) == str(runs[f"{task}_stage1"] / "last_checkpoint.pth")
            assert config.optim.lr == first.optim.lr / 4
    written = {name: (run / "last_checkpoint.pth").stat().st_mtime_ns for name, run in runs.items()}

    # What is done is not done again.
    assert main(command) == 0
    assert written == {
        name: (run / "last_checkpoint.pth").stat().st_mtime_ns for name, run in runs.items()
    }
    rows = json.loads((tmp_path / "scenes.json").read_text())["rows"]
    assert [(row["task"], row["measure"]) for row in rows] == [
        *[("detection", "AP")] * 2,
        *[("segmentation", "mIoU")] * 2,
    ]
    for row, run in zip(rows, ("msa", "ecoformer") * 2, strict=True):
        last = read_log(runs[f"{row['task']}_{run}"])[-1]
        assert row["score"] == last[f"test_{row['measure']}"]
        assert ("difference" in row) == (run == "ecoformer")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--short-side", "32"], "a canvas of SCENES has 64 to 1024 pixels a side, not 32"),
        (["--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_bad_input_is_one_line(words: list[str], expected: str, refuse: Refuse) -> None:
    assert expected in refuse("scenes", *words)
