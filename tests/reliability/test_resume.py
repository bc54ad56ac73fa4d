"""R4, R11, R12: going on with other settings, the forms of a file, and refits."""

from __future__ import annotations

import builtins
import errno
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import pvt
from ecoformer import export_released, load_checkpoint
from ecoformer.checkpoint import read_checkpoint
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import fit_hash_functions, hash_layers
from tests.engine.training import evaluate, make_batches
from tests.reliability.runs import BEST, LAST, Run, Strike, assert_same_run, run, start

SETTINGS = [
    (["--batch-size", "4"], 1, "batch-size"),
    ([], 2, "world-size"),
    (["--weight-decay", "0.3"], 1, "config"),
]


def test_other_workers_change_nothing(flags: list[str], whole: Run, tmp_path: Path) -> None:
    for number, workers in ((1, "2"), (2, "0")):
        strike = Strike("step", number, signal.SIGTERM)
        stopped = start([*flags, "--num-workers", workers], tmp_path, hook=strike)
        assert stopped.wait() == [75], stopped.said()
    assert_same_run(run([*flags, "--num-workers", "1"], tmp_path), whole)


@pytest.mark.parametrize("num_ranks", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_more_than_two_ranks_go_on_inside_an_epoch(
    num_ranks: int, flags: list[str], tmp_path: Path
) -> None:
    flags = [*flags, "--batch-size", "2", "--amp-dtype", "none"]
    whole = run(flags, tmp_path / "whole", world_size=num_ranks)
    strike = Strike("step", 4, signal.SIGTERM, rank=1)
    stopped = start(flags, tmp_path / "stopped", world_size=num_ranks, hook=strike)
    assert stopped.wait() == [75] * num_ranks, stopped.said()
    assert_same_run(run(flags, stopped.folder, world_size=num_ranks), whole)


@pytest.mark.parametrize(("change", "world_size", "permission"), SETTINGS)
def test_other_settings_are_refused(
    change: list[str], world_size: int, permission: str, flags: list[str], tmp_path: Path
) -> None:
    stopped = start(flags, tmp_path, hook=Strike("step", 4, signal.SIGTERM))
    assert stopped.wait() == [75], stopped.said()
    before = (tmp_path / LAST).read_bytes()
    refused = start([*flags, *change], tmp_path, world_size=world_size)
    assert 2 in refused.wait()
    assert f"--allow-resume-change {permission}" in refused.said()
    assert (tmp_path / LAST).read_bytes() == before


@pytest.mark.parametrize("last", ["missing", "cut", "empty"])
def test_the_best_checkpoint_stands_in_for_a_damaged_last_one(
    last: str, flags: list[str], whole: Run, tmp_path: Path
) -> None:
    stopped = start(flags, tmp_path, hook=Strike("step", 4, signal.SIGTERM))
    assert stopped.wait() == [75], stopped.said()
    path = tmp_path / LAST
    if last == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if last == "cut" else 0])
    ended = run(flags, tmp_path)
    assert f"{tmp_path / BEST}: going on at epoch 1, step 0" in ended.said()
    assert (f"{path} is damaged" in ended.said()) == (last != "missing")
    assert_same_run(ended, whole)


def refuse_to_read(rank: int) -> None:
    """The disk gives nothing of the last checkpoint."""
    real = builtins.open

    def open_or_refuse(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).endswith(LAST):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, *arguments, **options)

    builtins.open = open_or_refuse


def test_a_last_checkpoint_that_cannot_be_read_is_kept(
    flags: list[str], whole: Run, tmp_path: Path
) -> None:
    for name in (LAST, BEST):
        shutil.copy(whole.folder / name, tmp_path)
    refused = start(flags, tmp_path, hook=refuse_to_read)
    assert refused.wait() == [2], refused.said()
    assert f"{tmp_path / LAST}: cannot be read (Input/output error)" in refused.said()
    assert (tmp_path / LAST).read_bytes() == (whole.folder / LAST).read_bytes()


@pytest.mark.parametrize("number", [0, 2])
def test_going_on_around_a_refit(
    number: int, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    """Before the refit of the third epoch, where a stop undoes it, and after its first step."""
    strike = Strike("fit", 2, signal.SIGTERM) if number == 0 else Strike("step", 6, signal.SIGTERM)
    stopped = start(pair_flags, tmp_path, world_size=2, hook=strike)
    assert stopped.wait() == [75, 75], stopped.said()
    found = read_checkpoint(tmp_path / LAST)
    assert (found["epoch"] + 1, found["step"]) == (2, number // 2)
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)


def write_buffers(rank: int, folder: Path) -> None:
    """Each rank's hash buffers after every fit."""
    from ecoformer.engine import train

    real, count = train.broadcast_hash_functions, -1

    def broadcast(model: nn.Module) -> None:
        nonlocal count
        count += 1
        real(model)
        torch.save(buffers(model), folder / f"fit{count}.{rank}.pth")

    train.broadcast_hash_functions = broadcast


class BufferWriter:
    """``write_buffers`` into a folder, as a hook."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> None:
        """Arm it in a rank's process."""
        write_buffers(rank, self.folder)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all hash functions."""
    return {
        f"{name}.{key}": value.clone()
        for name, layer in hash_layers(model).items()
        for key, value in layer.named_buffers()
    }


def test_hash_functions_of_two_ranks_never_differ(pair_flags: list[str], tmp_path: Path) -> None:
    run([*pair_flags, "--k", "1"], tmp_path, world_size=2, hook=BufferWriter(tmp_path))
    for fit in range(3):
        one, other = (
            torch.load(tmp_path / f"fit{fit}.{rank}.pth", weights_only=True) for rank in (0, 1)
        )
        assert one.keys() == other.keys()
        assert len(one) == 8
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def fitted() -> nn.Module:
    model = small_pvt().eval()
    fit_hash_functions(model, make_batches(1, 8)[0][0], torch.Generator().manual_seed(0))
    return model


def small_pvt() -> nn.Module:
    return pvt.create_model("pvt_v2_b0", num_classes=2, hashing=HashConfig(num_fit_steps=2))


@pytest.mark.parametrize("form", ["training", "bare", "safetensors"])
def test_all_forms_of_a_file_give_the_same_logits(
    form: str, fitted: nn.Module, tmp_path: Path
) -> None:
    state = export_released(fitted)
    path = tmp_path / "model.pth"
    if form == "safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save({"model": state, "epoch": 3} if form == "training" else state, path)
    model = small_pvt().eval()
    load_checkpoint(model, path)
    images = make_batches(1, 4, seed=1)[0][0]
    assert torch.equal(model(images), fitted(images))


def test_shuffled_evaluation_changes_nothing(fitted: nn.Module) -> None:
    before = buffers(fitted)
    batches = make_batches(6, 4)
    results = []
    for seed in range(3):
        shuffled: Sequence[tuple[Tensor, Tensor]] = random.Random(seed).sample(batches, 6)
        results.append(evaluate(fitted, shuffled))
    assert results[0] == results[1] == results[2]
    assert all(torch.equal(before[name], value) for name, value in buffers(fitted).items())


# A process of the demo; after so many steps it stops and saves, or just tells the time.
DEMO = """
import os, signal, sys, time
from ecoformer.engine import train
from ecoformer.engine.command import run_command
from pvt import FAMILY

real, count = train.update_weights, 0

def update(*args):
    global count
    norm, count = real(*args), count + 1
    if str(count) == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGTERM)
    if sys.argv[1] == "time":
        print("first step", time.time(), flush=True)
        os._exit(0)
    return norm

train.update_weights = update
raise SystemExit(run_command(sys.argv[2:], FAMILY))
"""


def run_demo(goal: str, folder: Path) -> tuple[float, str]:
    """Seconds from the start of a process to the end of its first step, and what it said."""
    flags = ["--config", "configs/demo/pvt_v2_b0_msa.py", "--data-set", "DIGITS"]
    command = [sys.executable, "-c", DEMO, goal, *flags, "--output_dir", str(folder)]
    began = time.time()
    ended = subprocess.run(command, capture_output=True, text=True)
    told = re.search(r"first step ([\d.]+)", ended.stdout)
    return float(told[1]) - began if told else math.nan, ended.stdout + ended.stderr


@pytest.mark.slow
def test_cost_of_a_resume(tmp_path: Path) -> None:
    """In the middle of an epoch of the demo, in turns with a fresh start; medians."""
    _, said = run_demo("10", tmp_path / "stopped")
    assert "saved at epoch 0, step 10" in said
    fresh_s, resumed_s = [], []
    for number in range(5):
        fresh_s.append(run_demo("time", tmp_path / str(number))[0])
        seconds, said = run_demo("time", tmp_path / "stopped")
        assert "going on at epoch 0, step 10" in said
        resumed_s.append(seconds)
    fresh, resumed = statistics.median(fresh_s), statistics.median(resumed_s)
    print(f"first step done after {fresh:.2f} s fresh, {resumed:.2f} s resumed")
    assert resumed < fresh + 5


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(image_folder, tmp_path / "images"))


def swap_classes(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "class0").rename(root / split / "class2")


def remove_images(root: Path) -> None:
    for path in sorted((root / "train" / "class1").iterdir())[:4]:
        path.unlink()


def rename_an_image(root: Path) -> None:
    path = root / "val" / "class1" / "01.png"
    path.rename(path.with_name("z.png"))


@pytest.mark.parametrize("change", [swap_classes, remove_images, rename_an_image])
def test_other_data_are_refused(
    change: Callable[[Path], None], flags: list[str], images: Path, tmp_path: Path
) -> None:
    flags = [*flags, "--data-path", str(images)]
    folder = tmp_path / "run"
    stopped = start(flags, folder, hook=Strike("step", 5, signal.SIGTERM))
    assert stopped.wait() == [75], stopped.said()
    before = (folder / LAST).read_bytes()
    change(images)
    refused = start(flags, folder)
    assert refused.wait() == [2], refused.said()
    assert "--allow-resume-change data" in refused.said().splitlines()[-1]
    assert (folder / LAST).read_bytes() == before
    allowed = run([*flags, "--allow-resume-change", "data"], folder)
    is_shorter = change is remove_images
    assert ("epoch 1 is over, after 3 steps" in allowed.said()) == is_shorter
    assert len((folder / "log.txt").read_text().splitlines()) == 3


def test_the_same_data_elsewhere_are_no_change(
    flags: list[str], whole: Run, images: Path, tmp_path: Path
) -> None:
    stopped = start(flags, tmp_path / "run", hook=Strike("step", 4, signal.SIGTERM))
    assert stopped.wait() == [75], stopped.said()
    run([*flags, "--data-path", str(images)], stopped.folder)
    assert read_checkpoint(stopped.folder / LAST)["loss_sums"] == [0, 0, 0]
    lines = (stopped.folder / "log.txt").read_text(), (whole.folder / "log.txt").read_text()
    assert lines[0] == lines[1]


def test_a_checkpoint_that_does_not_know_its_data_goes_on(
    flags: list[str], whole: Run, tmp_path: Path
) -> None:
    stopped = start(flags, tmp_path, hook=Strike("step", 4, signal.SIGTERM))
    assert stopped.wait() == [75], stopped.said()
    older = dict(read_checkpoint(tmp_path / LAST))
    for name in ("data", "optimizer_names", "num_optimizer_states"):
        del older[name]
    torch.save(older, tmp_path / LAST)
    ended = run(flags, tmp_path)
    assert "so they go unchecked" in ended.said()
    assert_same_run(ended, whole)


@pytest.mark.parametrize(("batch_size", "place"), [("4", (1, 4)), ("12", (1, 1))])
def test_another_batch_size_goes_on_at_the_same_image(
    batch_size: str, place: tuple[int, int], flags: list[str], tmp_path: Path
) -> None:
    stopped = start(flags, tmp_path, hook=Strike("step", 4, signal.SIGTERM))
    assert stopped.wait() == [75], stopped.said()
    change = ["--batch-size", batch_size, "--allow-resume-change", "batch-size"]
    ended = run([*flags, *change], tmp_path)
    [line] = [line for line in ended.said().splitlines() if "of 8 samples each" in line]
    assert f"step 2, of 8 samples each, is step {place[1]} of {batch_size}" in line
    assert ("4 samples come again" in line) == (batch_size == "12")
    assert f"going on at epoch {place[0]}, step {place[1]}" in ended.said()


def test_what_a_file_lacks_is_said(flags: list[str], whole: Run, tmp_path: Path) -> None:
    torch.save(
        dict(read_checkpoint(whole.folder / BEST)),
        tmp_path / "x",
        _use_new_zipfile_serialization=False,
    )
    ended = run([*flags, "--resume", str(tmp_path / "x")], tmp_path / "run")
    assert "Nothing vouches for the file's bits" in ended.said()


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint_best.pth"])
def test_a_folder_of_the_released_twins_scripts_goes_on(
    name: str, flags: list[str], whole: Run, tmp_path: Path
) -> None:
    shutil.copy(whole.folder / LAST, tmp_path / name)
    for more in ([], ["--eval"]):
        ended = run([*flags, *more], tmp_path)
        assert name in ended.said()
        assert "epoch 2, 3 of 3" not in ended.said()
