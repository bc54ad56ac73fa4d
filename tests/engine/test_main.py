"""Whole runs through the command line: what they leave, resume, measure and refuse."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ecoformer.checkpoint import read_checkpoint, save_atomic
from ecoformer.engine.command import run_command
from ecoformer.engine.saving import Saver
from pvt import FAMILY
from tests.engine.ranks import run_ranks
from tests.engine.training import assert_same_state

LOG_KEYS = {
    *("train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"),
}


def folder_of(flags: list[str]) -> Path:
    return Path(flags[flags.index("--output_dir") + 1])


def moved(flags: list[str], folder: Path) -> list[str]:
    """The same command with another output folder."""
    return [str(folder) if flag == str(folder_of(flags)) else flag for flag in flags]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_saves: int) -> None:
    """Let a run be interrupted once it has saved so many epochs."""
    real, count = Saver.save, 0

    def save(self: Saver, **kwargs: Any) -> None:
        nonlocal count
        real(self, **kwargs)
        count += 1
        if count == num_saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "save", save)


def test_a_run_leaves_what_it_promises(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(tiny_flags, FAMILY) == 0
    folder = folder_of(tiny_flags)
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert all(set(line) == LOG_KEYS for line in lines)
    # Base rate 5e-4 for 512 images a step; eight of them. Epochs 0 and 1 warm up.
    assert [line["train_lr"] for line in lines[:2]] == [1e-6, 1e-6]
    assert list(folder.glob("events.out.tfevents.*"))
    assert "model: pvt_v2_b0" in (folder / "config.yaml").read_text()
    last, best = (read_checkpoint(folder / f"{name}_checkpoint.pth") for name in ("last", "best"))
    assert {"model", "optimizer", "lr_scheduler", "epoch", "scaler", "config"} <= last.keys()
    assert last["epoch"] == 2
    accuracies = [line["test_acc1"] for line in lines]
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert last["best_score"] == best["best_score"] == max(accuracies)
    assert "epoch 2, 3 of 3 done" in capsys.readouterr().out

    # A checkpoint gives the accuracy that the log says.
    assert run_command([*tiny_flags, "--eval"], FAMILY) == 0
    assert f"top-1 {accuracies[-1]:.2f} %" in capsys.readouterr().out
    best_path = str(folder / "best_checkpoint.pth")
    assert run_command([*tiny_flags, "--resume", best_path, "--eval"], FAMILY) == 0
    assert f"top-1 {max(accuracies):.2f} %" in capsys.readouterr().out


def test_resumed_run_equals_uninterrupted(
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Resumed just after the first fit's epoch, and just before the second fit.
    flags = [*tiny_flags, "--k", "2"]
    whole, broken = folder_of(flags), tmp_path / "broken"
    assert run_command(flags, FAMILY) == 0

    for epoch in (1, 2):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1)
            assert run_command(moved(flags, broken), FAMILY) == 130
        assert "interrupted" in capsys.readouterr().err
        # An epoch that is done again, and a line that the crash cut.
        with (broken / "log.txt").open("a") as file:
            file.write(json.dumps({"epoch": epoch}) + '\n{"epoch": 0, "tr')
    assert run_command(moved(flags, broken), FAMILY) == 0
    assert "going on at epoch 2" in capsys.readouterr().out

    assert (broken / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    for name in ("last_checkpoint.pth", "best_checkpoint.pth"):
        assert_same_state(broken / name, whole / name)

    assert run_command(flags, FAMILY) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert_same_state(broken / "last_checkpoint.pth", whole / "last_checkpoint.pth")


def test_finetuning_converts_fits_and_keeps_eval_mode(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage1 = moved(tiny_flags, tmp_path / "stage1")
    assert run_command([*stage1, "--attn_type", "msa", "--epochs", "1"], FAMILY) == 0
    weights = str(tmp_path / "stage1" / "last_checkpoint.pth")
    capsys.readouterr()
    assert run_command([*tiny_flags, "--epochs", "1", "--finetune", weights], FAMILY) == 0
    assert "derived" in capsys.readouterr().out
    last = read_checkpoint(folder_of(tiny_flags) / "last_checkpoint.pth")
    assert last["config"]["train_mode"] is False
    assert last["model"]["block1.0.attn.hash.is_fitted"]


def test_finetuning_leaves_out_weights_only_where_that_is_asked_for(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = FAMILY.create_model("pvt_v2_b0", "msa", num_classes=2).state_dict()
    del state["norm4.weight"]
    save_atomic(state, tmp_path / "part.pth")
    command = [*tiny_flags, "--epochs", "1", "--finetune", str(tmp_path / "part.pth")]
    assert run_command(command, FAMILY) == 2
    assert "norm4.weight" in capsys.readouterr().err
    assert run_command([*command, "--allow-missing"], FAMILY) == 0
    assert "1 left as they were (norm*)" in capsys.readouterr().out


def _run(flags: list[str]) -> int:
    return run_command(flags, FAMILY)


def test_two_ranks_train_and_one_evaluates(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*tiny_flags, "--batch-size", "4", "--anchor", "8", "--epochs", "2"]
    assert run_ranks(_run, 2, flags) == [0, 0]
    accuracy = json.loads((folder_of(flags) / "log.txt").read_text().splitlines()[-1])["test_acc1"]

    # One process evaluates to the same accuracy, and does not train on unasked.
    assert run_command([*flags, "--eval"], FAMILY) == 0
    assert f"top-1 {accuracy:.2f} %" in capsys.readouterr().out
    assert run_command(flags, FAMILY) == 2
    assert "--allow-resume-change world-size" in capsys.readouterr().err


class _Weights(BaseHTTPRequestHandler):
    """Serves the same weights to all who ask, and counts them."""

    content = b""
    num_asked = 0

    def do_GET(self) -> None:
        """Answer one request."""
        type(self).num_asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def _run_at_home(flags: list[str], home: Path) -> tuple[int, int]:
    """The exit code, and how often it was said that nobody has verified the weights."""
    os.environ.update(TORCH_HOME=str(home), no_proxy="127.0.0.1")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = run_command(flags, FAMILY)
    return code, said.getvalue().count("not verified")


def test_one_rank_downloads_and_warns_for_all(tiny_flags: list[str], tmp_path: Path) -> None:
    save_atomic(
        FAMILY.create_model("pvt_v2_b0", "msa", num_classes=2).state_dict(), tmp_path / "msa.pth"
    )
    _Weights.content = (tmp_path / "msa.pth").read_bytes()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Weights) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/msa.pth"
        flags = [*tiny_flags, "--attn_type", "msa", "--batch-size", "4", "--eval", "--resume", url]
        assert run_ranks(_run_at_home, 2, flags, tmp_path) == [(0, 1), (0, 0)]
        server.shutdown()
    assert _Weights.num_asked == 1


def _run_and_listen(flags: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return run_command(flags, FAMILY), said.getvalue()


def test_the_rank_that_fails_says_why(
    tiny_flags: list[str], image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_folder, tmp_path / "data")
    # The second image to evaluate belongs to the second rank.
    bad = sorted((tmp_path / "data" / "val").rglob("*.png"))[1]
    bad.write_text("not an image")
    flags = [*tiny_flags, "--data-path", str(tmp_path / "data"), "--batch-size", "4"]
    flags += ["--attn_type", "msa", "--epochs", "1"]
    (code, silence), (bad_code, line) = run_ranks(_run_and_listen, 2, flags)
    assert (code, bad_code) == (1, 2)
    assert silence == ""
    assert line.startswith(f"error: cannot read {bad}")
