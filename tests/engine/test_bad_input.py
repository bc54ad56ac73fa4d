"""What users get wrong: one clear line on standard error, exit code 2, no traceback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import pvt
from ecoformer.engine.command import run_command
from pvt import FAMILY
from tests.privileges import without_privileges

Refuse = Callable[[Sequence[str]], str]


@pytest.fixture
def refuse(tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run the tiny command with more flags, and return the one line that refuses it."""

    def run(flags: Sequence[str]) -> str:
        capsys.readouterr()
        assert run_command([*tiny_flags, *flags], FAMILY) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


def save_weights(path: Path, model: torch.nn.Module) -> str:
    torch.save(model.state_dict(), path)
    return str(path)


def make_class(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    return folder


def test_missing_data_folder(refuse: Refuse) -> None:
    assert "/no/such/place" in refuse(["--data-path", "/no/such/place"])


def test_empty_class_folder(refuse: Refuse, tmp_path: Path) -> None:
    for split in ("train", "val"):
        empty = make_class(tmp_path / "data" / split, "cat")
    line = refuse(["--data-path", str(tmp_path / "data")])
    assert str(empty.parent.parent) in line
    assert "no image" in line


@pytest.mark.parametrize("goal", [["--eval"], []])
def test_wrong_class_count(refuse: Refuse, tmp_path: Path, goal: list[str]) -> None:
    weights = save_weights(tmp_path / "w.pth", pvt.create_model("pvt_v2_b0", "msa", num_classes=7))
    line = refuse(["--attn_type", "msa", "--resume", weights, *goal])
    assert weights in line
    assert ("7" in line and "2" in line) if goal else "--finetune" in line


def test_unknown_flag(refuse: Refuse) -> None:
    line = refuse(["--warmup-epoch", "3"])
    assert "--warmup-epoch" in line
    assert "did you mean '--warmup-epochs'" in line


def test_unknown_config_field(refuse: Refuse, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text("drop_pth = 0.1\n")
    line = refuse(["--config", str(config)])
    assert str(config) in line
    assert "did you mean 'drop_path'" in line


def test_config_that_is_not_python(refuse: Refuse, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text("model = = 'pvt_v2_b0'\n")
    assert str(config) in refuse(["--config", str(config)])


def test_too_few_tokens_to_fit(refuse: Refuse) -> None:
    # Six images of four tokens in the third stage.
    line = refuse(["--batch-size", "6", "--anchor", "25"])
    assert "block3.0.attn" in line
    assert "25" in line


def test_evaluation_without_weights(refuse: Refuse) -> None:
    assert "--resume" in refuse(["--eval"])


@pytest.mark.parametrize("other", [("pvt_v2_b1", "ecoformer"), ("pvt_v2_b0", "performer")])
def test_weights_of_another_architecture(
    refuse: Refuse, tmp_path: Path, other: tuple[str, str]
) -> None:
    weights = save_weights(tmp_path / "w.pth", pvt.create_model(*other, num_classes=2))
    assert weights in refuse(["--resume", weights, "--eval"])


def test_attention_that_the_model_lacks(refuse: Refuse) -> None:
    line = refuse(["--model", "pvt_v2_b2_li", "--attn_type", "ecoformer"])
    assert "sra" in line


def test_evaluation_of_an_unfitted_model(refuse: Refuse, tmp_path: Path) -> None:
    weights = save_weights(tmp_path / "w.pth", pvt.create_model("pvt_v2_b0", num_classes=2))
    assert "not fitted" in refuse(["--resume", weights, "--eval"])


def test_weights_alone_do_not_go_on(refuse: Refuse, tmp_path: Path) -> None:
    weights = save_weights(tmp_path / "w.pth", pvt.create_model("pvt_v2_b0", num_classes=2))
    assert "--finetune" in refuse(["--resume", weights])


def test_state_of_another_optimizer(refuse: Refuse, tiny_flags: list[str], tmp_path: Path) -> None:
    assert run_command([*tiny_flags, "--epochs", "1", "--attn_type", "msa"], FAMILY) == 0
    path = tmp_path / "run" / "last_checkpoint.pth"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["optimizer"]["state"]
    state[0]["exp_avg"] = torch.zeros(3, 3)
    torch.save(checkpoint, path)
    line = refuse(["--epochs", "1", "--attn_type", "msa"])
    assert str(path) in line
    assert "exp_avg" in line


@pytest.mark.parametrize(
    ("change", "permission", "weight_decay"),
    [
        (["--weight-decay", "0.5"], "config", 0.5),
        (["--batch-size", "4"], "batch-size", 0.05),
        (["--no-train-mode"], "config", 0.05),
    ],
)
def test_run_with_other_settings(
    refuse: Refuse,
    tiny_flags: list[str],
    tmp_path: Path,
    change: list[str],
    permission: str,
    weight_decay: float,
) -> None:
    flags = ["--attn_type", "msa"]
    assert run_command([*tiny_flags, *flags, "--epochs", "1"], FAMILY) == 0
    line = refuse([*flags, "--epochs", "1", *change])
    assert f"{change[0].strip('-').replace('-', '_').removeprefix('no_')} " in line
    assert f"--allow-resume-change {permission}," in line
    # Another number of epochs is a change too, so both are allowed here.
    allowed = ["--epochs", "2", "--allow-resume-change", "config", "batch-size"]
    assert run_command([*tiny_flags, *flags, *change, *allowed], FAMILY) == 0
    checkpoint = torch.load(tmp_path / "run" / "last_checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == 1
    for group in checkpoint["optimizer"]["param_groups"]:
        assert group["weight_decay"] in (0.0, weight_decay)


def test_folder_that_cannot_be_written(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refuse(["--output_dir", str(tmp_path / "file" / "run")])
    assert f"{tmp_path}/file/run/config.yaml: cannot be written (Not a directory)" in line


@pytest.mark.parametrize(("flag", "name"), [("--output_dir", "run"), ("--config", "mine.py")])
def test_folder_that_may_not_be_looked_into(
    refuse: Refuse, flag: str, name: str, tmp_path: Path
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    with without_privileges():
        line = refuse(["--data-set", "DIGITS", flag, str(locked / name)])
    assert str(locked / name) in line
    locked.chmod(0o700)


def test_device_that_is_not_there(refuse: Refuse) -> None:
    assert "CUDA device 77" in refuse(["--device", "cuda:77"])
