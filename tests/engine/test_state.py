"""Checkpoints: what they hold, that a run goes on from them exactly, and when none is written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ecoformer.checkpoint import read_checkpoint
from ecoformer.config import Config
from ecoformer.engine import optim, saving
from ecoformer.engine.folder import RunFolder
from ecoformer.engine.resume import restore
from ecoformer.engine.saving import Saver
from ecoformer.engine.state import BEST_CHECKPOINT, LAST_CHECKPOINT, TrainState
from ecoformer.errors import InputError, NonFiniteError
from tests.engine.training import Classifier, assert_equal, make_batches, start, train, weights

FIELDS: dict[str, Any] = {
    **{"opt": "adamw", "weight_decay": 0.05, "amp_dtype": "float16", "train_mode": True},
    **{"epochs": 4, "warmup_epochs": 1, "seed": 3},
}


def run_epochs(state: TrainState, config: Config, num_epochs: int) -> None:
    for _ in range(num_epochs):
        train(state, config, make_batches(4, 8))
        state.finish_epoch(50.0)


def open_saver(state: TrainState, config: Config, folder: Path) -> Saver:
    """Saves into a folder of the test's."""
    return Saver(state, config, RunFolder(folder))


def save(state: TrainState, config: Config, folder: Path, *, is_best: bool = False) -> None:
    """A last save, which comes back when the files are there."""
    with open_saver(state, config, folder) as saver:
        saver.save(is_best=is_best, is_last=True)


def states_of(state: TrainState) -> dict[str, Any]:
    """What a run goes on from, beside its weights."""
    moments = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in state.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    return {**weights(state.model), **moments}


@pytest.mark.parametrize("num_done", [1, 4])
def test_goes_on_in_the_middle_of_an_epoch(num_done: int, tmp_path: Path) -> None:
    whole, config = start(Classifier(drop_rate=0.3), **FIELDS)
    run_epochs(whole, config, 3)

    first, config = start(Classifier(drop_rate=0.3), **FIELDS)
    run_epochs(first, config, 1)
    train(first, config, make_batches(4, 8)[:num_done])
    save(first, config, tmp_path)

    second, config = start(Classifier(drop_rate=0.3), **FIELDS)
    path = tmp_path / LAST_CHECKPOINT
    restore(second, read_checkpoint(path), config, str(path))
    assert (second.epoch, second.step) == (1, num_done)
    run_epochs(second, config, 2)
    assert_equal(states_of(second), states_of(whole))
    assert second.scaler.state_dict() == whole.scaler.state_dict()
    assert second.learning_rate == whole.learning_rate


def test_what_rounds_otherwise_is_said(caplog: pytest.LogCaptureFixture) -> None:
    state, config = start(Classifier(), **FIELDS)
    checkpoint = state.to_checkpoint(config)
    restore(state, checkpoint, config, "the file")
    assert "rounds otherwise" not in caplog.text
    # Earlier files do not know their backend.
    del checkpoint["versions"]["device"]
    checkpoint["versions"]["attention backend"] = "reference"
    restore(state, checkpoint, config, "the file")
    assert "attention backend reference, here" in caplog.text
    assert "device" not in caplog.text
    checkpoint["versions"] = 3
    with pytest.raises(InputError, match="does not fit"):
        restore(state, checkpoint, config, "the file")


@pytest.mark.parametrize("is_first_fused", [True, False])
def test_a_fused_optimiser_goes_on_from_either_form(
    is_first_fused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On CUDA it is fused; earlier versions' was not, and kept its counters on the host."""
    path = tmp_path / LAST_CHECKPOINT
    monkeypatch.setattr(optim, "_is_on_cuda", lambda model: is_first_fused)
    first, config = start(Classifier(), **FIELDS)
    run_epochs(first, config, 1)
    save(first, config, tmp_path)
    run_epochs(first, config, 1)

    monkeypatch.setattr(optim, "_is_on_cuda", lambda model: True)
    second, config = start(Classifier(), **FIELDS)
    with caplog.at_level(logging.INFO):
        restore(second, read_checkpoint(path), config, str(path))
    assert all(group["fused"] for group in second.optimizer.param_groups)
    assert ("rounds otherwise" in caplog.text) == (not is_first_fused)
    run_epochs(second, config, 1)
    if is_first_fused:
        assert_equal(states_of(second), states_of(first))
    else:
        for name, value in states_of(second).items():
            torch.testing.assert_close(value, states_of(first)[name], rtol=1e-4, atol=1e-6)


def test_losses_before_and_after_a_checkpoint_make_one_mean(tmp_path: Path) -> None:
    batches = make_batches(4, 8)
    whole, config = start(Classifier())
    train(whole, config, batches)

    first, config = start(Classifier())
    train(first, config, batches[:3])
    save(first, config, tmp_path)
    second, config = start(Classifier())
    restore(second, read_checkpoint(tmp_path / LAST_CHECKPOINT), config, "it")
    train(second, config, batches)
    assert second.loss.mean() == whole.loss.mean()


def test_best_is_written_before_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(saving, "save_atomic", lambda _, path: names.append(path.name))
    state, config = start(Classifier())
    save(state, config, tmp_path, is_best=True)
    save(state, config, tmp_path)
    assert names == [BEST_CHECKPOINT, LAST_CHECKPOINT, LAST_CHECKPOINT]


def test_bad_weights_are_not_written(tmp_path: Path) -> None:
    """The run hears of them in its next save, or where it waits for this one."""
    state, config = start(Classifier())
    torch.nn.init.constant_(state.model.get_parameter("head.bias"), float("nan"))
    with pytest.raises(NonFiniteError, match=r"head\.bias"):
        save(state, config, tmp_path, is_best=True)
    with open_saver(state, config, tmp_path) as saver:
        saver.save(is_best=True)
        with pytest.raises(NonFiniteError, match=r"head\.bias"):
            saver.save()
    assert not list(tmp_path.iterdir())


def test_goes_on_from_a_released_training_file() -> None:
    """It knows its epoch, optimiser and scaler, but neither a best accuracy nor our settings."""
    first, config = start(Classifier(), **FIELDS)
    run_epochs(first, config, 2)
    released = {
        name: first.to_checkpoint(config)[name]
        for name in ("model", "optimizer", "lr_scheduler", "epoch", "scaler")
    }
    second, config = start(Classifier(), **FIELDS)
    restore(second, released, config, "released.pth")
    assert (second.epoch, second.step, second.learning_rate) == (2, 0, first.learning_rate)
    assert_equal(states_of(second), states_of(first))


def test_the_best_accuracy_of_earlier_files_goes_on() -> None:
    first, config = start(Classifier(), **FIELDS)
    checkpoint = first.to_checkpoint(config) | {"best_acc1": 71.5}
    del checkpoint["best_score"]
    second, config = start(Classifier(), **FIELDS)
    restore(second, checkpoint, config, "it")
    assert second.best_score == 71.5


def test_all_changes_are_named_and_what_allows_them() -> None:
    first, config = start(Classifier(), lr=1e-3)
    checkpoint = first.to_checkpoint(config)
    second, config = start(Classifier(), lr=2e-3, batch_size=64, num_workers=3, data_path="/moved")
    with pytest.raises(InputError) as refusal:
        restore(second, checkpoint, config, "it")
    said = str(refusal.value)
    assert "lr 0.001 -> 0.002" in said
    assert "batch_size 32 -> 64" in said
    assert "num_workers" not in said
    assert "/moved" not in said
    for permission in ("config", "batch-size"):
        assert permission in said[said.index("--allow-resume-change") :]


@pytest.mark.parametrize(
    "damage",
    [
        {"epoch": "three"},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"optimizer": None},
        {"loss_sums": None},
        {"config": ["a list"]},
        {"config": {}, "world_size": None},
        {"scaler": {"scale": 1.0}},
    ],
    ids=str,
)
def test_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    first, config = start(Classifier(), **FIELDS)
    checkpoint = {**first.to_checkpoint(config), **damage}
    second, config = start(Classifier(), **FIELDS)
    with pytest.raises(InputError, match=r"^broken\.pth: "):
        restore(second, checkpoint, config, "broken.pth")
