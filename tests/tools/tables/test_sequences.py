"""The short protocol of sequences: cut from the full one, and apart from what is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecoformer.config import make_config
from ecoformer.config.file import read_config
from ecoformer.engine.logs import read_log
from ecoformer.tools.tables.command import main
from tests.tools.tables.conftest import Refuse

ROOT = Path(__file__).parents[3]
KINDS = {"msa", "msa_share_qk", "performer", "ecoformer"}


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """The full protocols, with shorter sequences and smaller batches."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, fields in (
        ("listops", "max_tokens = 24\nbatch_size = 8\nnum_fit_steps = 2"),
        ("pathfinder", "batch_size = 2\nnum_fit_steps = 2"),
    ):
        base = ROOT / "configs" / "sequence" / f"{name}.py"
        (folder / f"{name}.py").write_text(f"_base_ = {str(base)!r}\n{fields}\n")
    return folder


def test_kinds_are_trained_once_and_stand_apart_from_what_is_published(
    configs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tables"
    command = [
        *("sequences", "--configs", str(configs), "--epochs", "2", "--steps", "2", "--seeds", "0"),
        *("--eval-samples", "20", "--device", "cpu", "--output-dir", str(folder)),
    ]
    assert main([*command, "--data-set", "LISTOPS"]) == 0
    runs = {run.name: run for run in (folder / "sequences" / "LISTOPS" / "seed0").iterdir()}
    assert set(runs) == KINDS | {"ecoformer_value_bias_normalized"}
    config = read_config(runs["performer"] / "config.yaml")
    # 2 steps of 8 sequences, all else of the full protocol.
    assert (config.data.epoch_samples, config.data.eval_samples) == (16, 20)
    assert (config.optim.lr, config.optim.epochs, config.optim.sched) == (1.6e-3, 2, "poly")
    assert config.run.finetune is None
    written = {name: (run / "last_checkpoint.pth").stat().st_mtime_ns for name, run in runs.items()}

    assert main([*command, "--data-set", "PATHFINDER", "LISTOPS"]) == 0
    again = {name: (run / "last_checkpoint.pth").stat().st_mtime_ns for name, run in runs.items()}
    assert again == written
    table = json.loads((folder / "sequences.json").read_text())
    batches = "of 8 sequences of LISTOPS, up to 24 tokens, at a peak rate of 2.5e-05"
    assert batches in table["notes"][0]
    rows = table["rows"]
    assert [row["data"] for row in rows] == ["PATHFINDER"] * 10 + ["LISTOPS"] * 10
    short, published = rows[10:15], rows[15:]
    assert {(row["protocol"], row["steps"], row["num_seeds"]) for row in short} == {("short", 4, 1)}
    last = {run: read_log(runs[run])[-1]["test_acc1"] for run in runs}
    assert (short[0]["name"], short[0]["top1"]) == ("softmax", last["msa"])
    assert short[1]["difference"] == pytest.approx(short[1]["top1"] - last["msa"])
    # Of 20 sequences.
    assert all(top1 % 5 == pytest.approx(0) for top1 in last.values())
    assert {row["name"]: row["published"] for row in published}["Nystromformer"] == 38.51
    assert {(row["protocol"], row["steps"]) for row in published} == {("full, published", 50_000)}
    assert not any("top1" in row for row in published)
    assert not any("published" in row for row in short)
    config = read_config(
        folder / "sequences" / "PATHFINDER" / "seed0" / "ecoformer" / "config.yaml"
    )
    assert (config.optim.lr, config.data.epoch_samples) == (8e-4, 4)


@pytest.mark.parametrize(
    ("name", "fields"), [("listops", {"max_tokens": 100}), ("pathfinder", {"batch_size": 32})]
)
def test_a_protocol_in_little_is_the_full_one_but_for(name: str, fields: dict[str, int]) -> None:
    folder = ROOT / "configs" / "sequence"
    full, little = (
        make_config(config=folder / part / f"{name}.py").to_flat() for part in (".", "short")
    )
    changed = {name: value for name, value in little.items() if value != full[name]}
    assert changed == {"config": changed["config"], **fields, "lr": 1.6e-2}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--configs", "nowhere"], "holds no listops.py; run it from a clone"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--eval-samples", "0"], "--eval-samples must be at least 1"),
    ],
)
def test_what_cannot_be_cut(words: list[str], expected: str, refuse: Refuse) -> None:
    assert expected in refuse("sequences", *words)
