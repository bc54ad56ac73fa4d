"""A run as a Python call: no words, no exit code, and nothing of the caller's is lost."""

from __future__ import annotations

import logging
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ecoformer.config import Config, to_yaml
from ecoformer.engine import run as calls
from ecoformer.engine.logs import print_log
from ecoformer.engine.run import evaluate, load_run, time_model, train
from ecoformer.engine.signals import STOP_SIGNALS
from ecoformer.errors import InputError, Preempted
from ecoformer.seeding import seed_everything
from ecoformer.tasks.classification import Accuracy
from tests.engine.ranks import run_ranks
from tests.engine.training import assert_equal, weights
from tests.tasks import toy
from tests.tasks.toy import stop_at

PVT = {"model": "pvt_v2_b0", "attn_type": "msa"}


def configure(image_folder: Path, folder: Path, **fields: object) -> Config:
    """One epoch of three steps on the tiny images, on the CPU."""
    return Config.from_flat(
        {
            **{**PVT, "data_path": str(image_folder), "output_dir": str(folder), "device": "cpu"},
            **{"batch_size": 8, "num_workers": 0, "repeated_aug": False, "input_size": 32},
            **{"epochs": 1, "warmup_epochs": 0, **fields},
        }
    )


def test_train_evaluate_and_open_again(image_folder: Path, tmp_path: Path) -> None:
    config = configure(image_folder, tmp_path)
    run = train(config)
    assert run.folder == tmp_path
    assert run.config == config
    assert not run.model.training
    [record] = run.log

    metrics = evaluate(config)
    assert isinstance(metrics, Accuracy)
    assert metrics.values == {name: record[name] for name in metrics.values}
    assert metrics.primary == "test_acc1"

    opened = load_run(tmp_path)
    assert opened.config == config
    assert opened.log == run.log
    assert not opened.model.training
    assert_equal(weights(opened.model), weights(run.model))


def test_a_start_behind_the_last_epoch(image_folder: Path, tmp_path: Path) -> None:
    config = configure(image_folder, tmp_path, start_epoch=3)
    with pytest.raises(InputError, match=r"--start_epoch 3 leaves none of 1 epochs"):
        train(config)


def test_twice_in_one_process(image_folder: Path, tmp_path: Path) -> None:
    """The second call starts fresh elsewhere, or goes on, as if it were the first."""
    first = train(configure(image_folder, tmp_path / "first"))
    second = train(configure(image_folder, tmp_path / "second"))
    assert_equal(weights(first.model), weights(second.model))
    assert first.log == second.log
    again = train(configure(image_folder, tmp_path / "first"))
    assert_equal(weights(again.model), weights(first.model))


def test_what_is_the_callers_stays(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arguments, signal handlers, printing, and this process."""
    handlers = [signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS]
    try:
        train(configure(image_folder, tmp_path))
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == [signal.SIG_IGN] * len(
            STOP_SIGNALS
        )
        with pytest.raises(InputError, match="/no/such/place"):
            train(configure(image_folder, tmp_path / "other", data_path="/no/such/place"))
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == [signal.SIG_IGN] * len(
            STOP_SIGNALS
        )
    finally:
        for number, handler in zip(STOP_SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
    assert capsys.readouterr().out == ""
    assert logging.getLogger("ecoformer").level == logging.NOTSET
    assert not dist.is_initialized()


def test_a_stop_spares_the_callers_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        stop_at(0, monkeypatch)
        with pytest.raises(Preempted):
            train(toy.configure(tmp_path), task=toy.Toy)
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_it_can_be_shown_what_it_says(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with print_log():
        train(configure(image_folder, tmp_path))
    assert "epoch 0, 1 of 1 done: train loss" in capsys.readouterr().out


def test_building_a_model_draws_nothing_of_the_callers(image_folder: Path, tmp_path: Path) -> None:
    train(configure(image_folder, tmp_path))
    run = load_run(tmp_path)

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    seed_everything(1)
    expected = draw()
    seed_everything(1)
    assert run.model is run.model
    assert draw() == expected


def test_in_another_thread(image_folder: Path, tmp_path: Path) -> None:
    """Signals belong to the main thread; all else is as there."""
    done: list[object] = []
    config = configure(image_folder, tmp_path)
    thread = threading.Thread(target=lambda: done.append(train(config).log))
    thread.start()
    thread.join()
    assert done == [load_run(tmp_path).log]


def _train_in_a_group(image_folder: Path, folder: Path, is_joined: bool) -> list[object]:
    """Two runs one after the other, in a group of ours or in those that each call joins."""
    if is_joined:
        dist.init_process_group("gloo")
    found: list[object] = []
    for name in ("first", "second"):
        run = train(configure(image_folder, folder / name, batch_size=4))
        assert dist.is_initialized() == is_joined
        found += [run.log, evaluate(configure(image_folder, folder / name, batch_size=4)).values]
    if is_joined:
        ones = torch.ones(())
        dist.all_reduce(ones)
        found.append(ones.item())
        dist.destroy_process_group()
    return found


@pytest.mark.parametrize("is_joined", [True, False])
def test_on_two_ranks_twice(image_folder: Path, tmp_path: Path, is_joined: bool) -> None:
    first, second = run_ranks(_train_in_a_group, 2, image_folder, tmp_path, is_joined)
    assert first == second
    assert first[:2] == first[2:4]
    assert first[4:] == [2.0] * is_joined


def _refuse_a_group_of_devices_alone() -> str:
    dist.init_process_group("cuda:gloo")
    try:
        with calls.process_group("cpu"):
            return "joined"
    except InputError as error:
        return str(error)
    finally:
        dist.destroy_process_group()


def test_a_group_that_cannot_reach_the_cpu() -> None:
    [said] = run_ranks(_refuse_a_group_of_devices_alone, 1)
    assert "cpu:gloo,cuda:nccl" in said


@pytest.mark.parametrize("protocol", [None, "released"])
def test_a_model_is_timed_without_data(protocol: str | None) -> None:
    fields = {**PVT, "batch_size": 1, "input_size": 32, "device": "cpu", "throughput": protocol}
    throughput = time_model(Config.from_flat(fields))
    assert throughput.median > 0
    assert (throughput.low == throughput.high) == (protocol == "released")
    assert str(throughput).endswith("images/s") or "images/s, 8 of 10" in str(throughput)


def test_what_is_no_run(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(InputError, match=r"is no run: it holds no config\.yaml"):
        load_run(tmp_path)
    train(configure(image_folder, tmp_path))
    (tmp_path / "last_checkpoint.pth").unlink()
    run = load_run(tmp_path)
    with pytest.raises(InputError, match=r"last_checkpoint\.pth"):
        _ = run.model
    (tmp_path / "log.txt").unlink()
    with pytest.raises(InputError, match="give a run's folder"):
        _ = run.log


def test_a_run_whose_data_are_gone(tmp_path: Path) -> None:
    fields = {**PVT, "data_path": str(tmp_path / "gone"), "output_dir": str(tmp_path)}
    (tmp_path / "config.yaml").write_text(to_yaml(Config.from_flat(fields)))
    run = load_run(tmp_path)
    with pytest.raises(InputError, match="gone"):
        _ = run.model


def test_a_wrong_flag_costs_no_import() -> None:
    """PyTorch comes when the words are understood."""
    code = (
        "import sys\n"
        "from pvt.main import main\n"
        "code = main(['--warmup-epoch', '3'])\n"
        "heavy = {'torch', 'timm', 'torchvision', 'numpy'} & sys.modules.keys()\n"
        "print(code, sorted(heavy))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "2 []\n", ended.stdout + ended.stderr
