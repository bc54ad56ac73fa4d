"""A task that the engine has never heard of is as safe as classification."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecoformer.checkpoint import read_checkpoint
from ecoformer.engine.run import evaluate, load_run, time_model, train
from ecoformer.errors import InputError, NonFiniteError, Preempted
from ecoformer.tasks import TASKS, find_task, register_task
from ecoformer.tasks.base import Meter, Metrics, Network
from tests.engine.ranks import run_ranks
from tests.engine.training import assert_same_run
from tests.reliability import runs
from tests.tasks.toy import NUM_HELD_OUT, NUM_STEPS, Ragged, Toy, ToyModel, configure, stop_at


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_it_trains_and_its_metrics_decide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ecoformer")
    run = train(configure(tmp_path), task=Toy)
    lines = run.log
    assert lines == log_of(tmp_path)
    values = {"test_error", "test_correlation", "num_sequences"}
    assert all(
        set(line) == values | {"train_lr", "train_loss", "epoch", "n_parameters"} for line in lines
    )
    errors = [line["test_error"] for line in lines]
    assert errors[-1] < errors[0]
    best = read_checkpoint(tmp_path / "best_checkpoint.pth")
    assert best["epoch"] == errors.index(min(errors))
    assert best["best_score"] == -min(errors)
    said = caplog.text
    assert "toy sequences; 3 epochs of 4 steps of 4 sequences" in said
    assert "fitted the hash functions of 1 layers" in said
    assert f"best test_error {min(errors):.4f}" in said
    assert "image" not in said
    assert " px" not in said


def test_it_is_evaluated_opened_and_timed(tmp_path: Path) -> None:
    config = configure(tmp_path)
    last = train(config, task=Toy).log[-1]
    metrics = evaluate(config, task=Toy)
    assert metrics.values == {name: last[name] for name in metrics.values}
    model = load_run(tmp_path, task=Toy).model
    assert isinstance(model, ToyModel)
    assert not model.training
    throughput = time_model(config, task=Toy)
    assert throughput.median > 0
    assert str(throughput).startswith("median ")
    assert "sequences/s" in str(throughput)


@pytest.mark.parametrize("update", [1, NUM_STEPS + 2, 2 * NUM_STEPS - 1])
def test_it_goes_on_exactly_where_it_was_stopped(
    update: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(configure(whole), task=Toy)
    with monkeypatch.context() as patch:
        stop_at(update, patch)
        with pytest.raises(Preempted, match="the same command goes on") as stop:
            train(configure(stopped), task=Toy)
    assert stop.value.exit_code == 75
    # The step is done; after the last one of an epoch, its evaluation is left.
    found = read_checkpoint(stopped / "last_checkpoint.pth")
    assert (found["epoch"] + 1, found["step"]) == (update // NUM_STEPS, update % NUM_STEPS + 1)
    train(configure(stopped), task=Toy)
    assert_same_run(stopped, whole)


def _train_pair(folder: Path, update: int | None) -> str:
    """Both ranks train; rank 1 alone gets the signal."""
    if update is not None and os.environ["RANK"] == "1":
        stop_at(update, pytest.MonkeyPatch())
    try:
        train(configure(folder, batch_size=2), task=Toy)
    except Preempted as stop:
        return f"{stop.exit_code}: {stop}"
    return "done"


def test_two_ranks_stop_and_go_on_together(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_ranks(_train_pair, 2, whole, None) == ["done", "done"]
    first, second = run_ranks(_train_pair, 2, stopped, NUM_STEPS + 1)
    assert first == second
    assert first.startswith("75: ")
    assert "saved at epoch 1, step 2" in first
    assert run_ranks(_train_pair, 2, stopped, None) == ["done", "done"]
    assert_same_run(stopped, whole)
    # Predictions of both ranks went into one correlation, each sequence once.
    assert {line["num_sequences"] for line in log_of(whole)} == {NUM_HELD_OUT}


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_command_stops_with_75_and_goes_on(world_size: int, tmp_path: Path) -> None:
    flags = [
        *("--task", "tests.tasks.toy:Toy", "--device", "cpu", "--batch-size", "4"),
        *("--epochs", "2", "--warmup-epochs", "0", "--k", "1", "--lr", "5"),
    ]
    whole = runs.run(flags, tmp_path / "whole", world_size=world_size)
    strike = runs.Strike("step", NUM_STEPS + 1, signal.SIGTERM, rank=world_size - 1)
    stopped = runs.start(flags, tmp_path / "stopped", world_size=world_size, hook=strike)
    assert stopped.wait() == [75] * world_size, stopped.said()
    assert "saved at epoch 1, step 2; the same command goes on" in stopped.said()
    # The weights of a task are no start for another one.
    change = ["--task", "classification", "--data-set", "DIGITS"]
    other = runs.start([*flags, *change], stopped.folder, world_size=world_size)
    assert 2 in other.wait()
    assert "task 'tests.tasks.toy:Toy' -> 'classification'" in other.said()
    runs.assert_same_run(runs.run(flags, stopped.folder, world_size=world_size), whole)


def test_a_bad_step_names_its_own_samples(tmp_path: Path) -> None:
    class Poisoned(Toy):
        """The fourth loss is no number."""

        count = 0

        def loss(self, network: Network, batch: Any) -> Tensor:
            self.count += 1
            loss = super().loss(network, batch)
            return loss * float("nan") if self.count == NUM_STEPS - 1 else loss

    with pytest.raises(NonFiniteError, match="epoch 0, step 2"):
        train(configure(tmp_path), task=Poisoned)
    report = json.loads((tmp_path / "non_finite.json").read_text())
    assert report["sequences"] == [[8, 9, 10, 11]]


def test_lists_of_any_length_are_a_batch(tmp_path: Path) -> None:
    run = train(configure(tmp_path, lr=20.0), task=Ragged)
    assert run.log[-1]["test_error"] < run.log[0]["test_error"]
    assert run.log[-1]["num_sequences"] == NUM_HELD_OUT


class Told(Meter):
    """Says what it is told."""

    def __init__(self, error: float) -> None:
        self.error = error

    def add(self, network: Network, batch: Any) -> None:
        """Look at nothing."""

    def finish(self) -> Metrics:
        return Metrics({"test_error": self.error}, "test_error", is_lower_better=True)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
@pytest.mark.parametrize(("errors", "drops"), [([5, 4, 3, 2, 1], False), ([1, 2, 3, 4, 5], True)])
def test_a_plateau_is_one_of_the_primary_metric(
    errors: list[float], drops: bool, tmp_path: Path
) -> None:
    """Errors that fall are progress, so the rate stays; those that rise are none."""

    class Plain(Toy):
        """Its errors are given."""

        def start_evaluation(self, device: torch.device) -> Told:
            return Told(errors[self.batches.epoch])

    fields = {"sched": "plateau", "patience_epochs": 0, "epochs": 5, "warmup_epochs": 1}
    rates = [line["train_lr"] for line in train(configure(tmp_path, **fields), task=Plain).log]
    assert rates[2] > rates[1]
    assert (rates[4] < rates[2]) == drops


@pytest.fixture
def registered() -> Any:
    """A name for the toy, for as long as a test lasts."""
    register_task("toy")(Toy)
    yield "toy"
    del TASKS["toy"]


def test_a_registered_task_is_trained_by_its_name(registered: str, tmp_path: Path) -> None:
    config = configure(tmp_path, task=registered, epochs=1)
    run = train(config)
    assert evaluate(config).values["test_error"] == run.log[0]["test_error"]
    assert isinstance(load_run(tmp_path).model, ToyModel)


def test_a_task_is_found_by_name_or_place(registered: str) -> None:
    assert find_task(registered) is Toy
    assert find_task("tests.tasks.toy:Toy") is sys.modules["tests.tasks.toy"].Toy
    assert find_task("classification").samples == "images"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clasification", "did you mean 'classification'"),
        ("no_such_module:Toy", "cannot be imported"),
        ("tests.tasks.toy:NoSuchTask", "cannot be imported"),
        ("tests.tasks.toy:ToyModel", "is no ecoformer.tasks.base.Task"),
        (":Toy", "cannot be imported"),
    ],
)
def test_what_is_no_task(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find_task(name)
