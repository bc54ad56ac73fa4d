"""Buffers that training moves, as BatchNorm's: alike on all ranks, and left alone by a fit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecoformer.checkpoint import read_checkpoint
from ecoformer.engine.launch import process_group
from ecoformer.engine.run import evaluate, train
from ecoformer.errors import Preempted
from ecoformer.ranks import broadcast_tensors, rank
from tests.engine.ranks import run_ranks
from tests.engine.training import assert_same_run
from tests.tasks.toy import DIM, NUM_STEPS, Toy, ToyModel, configure, stop_at


class Center(nn.Module):
    """Takes a running mean off, in training too, and puts a new tensor in its place."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean.lerp(x.detach().mean((0, 1)), 0.3)
        return x - self.mean


class NormedModel(ToyModel):
    """The toy with statistics before its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM, momentum=0.3)
        self.center = Center()

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(self.center(self.norm(tokens.mT).mT))


class Normed(Toy):
    """Learns with statistics."""

    def create_model(self, create: Callable[..., nn.Module]) -> nn.Module:
        return NormedModel()


class StoppedInFit(Normed):
    """A signal comes when its second fit has run the whole model."""

    num_fits = 0

    def fit_inputs(self, batch: dict[str, Tensor]) -> Any:
        self.num_fits += 1
        is_last = self.num_fits == 2

        def run(model: nn.Module) -> None:
            model(batch["tokens"])
            if is_last:
                os.kill(os.getpid(), signal.SIGTERM)

        return run


def _train_pair(folder: Path, num_accumulated: int, update: int | None) -> dict[str, float]:
    """Both ranks train, and measure what they have left; rank 1 may get a signal."""
    fields = {"batch_size": 2, "train_mode": True, "grad_accum_steps": num_accumulated}
    config = configure(folder, **fields)
    if update is not None and os.environ["RANK"] == "1":
        stop_at(update, pytest.MonkeyPatch())
    try:
        log = train(config, task=Normed).log
    except Preempted:
        return {}
    values = dict(evaluate(config, task=Normed).values)
    assert values == {name: log[-1][name] for name in values}
    return values


@pytest.mark.parametrize(("num_accumulated", "update"), [(1, NUM_STEPS + 1), (2, 2)])
def test_two_ranks_go_on_and_are_measured_with_the_statistics_of_rank_0(
    num_accumulated: int, update: int, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    first, second = run_ranks(_train_pair, 2, whole, num_accumulated, None)
    assert first == second
    assert run_ranks(_train_pair, 2, stopped, num_accumulated, update) == [{}, {}]
    found = read_checkpoint(stopped / "last_checkpoint.pth")
    assert found["epoch"] + 1 == 1
    assert 0 < found["step"] < NUM_STEPS
    assert run_ranks(_train_pair, 2, stopped, num_accumulated, None) == [first, first]
    assert_same_run(stopped, whole)


def test_a_stop_in_a_fit_moves_no_statistics(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(configure(whole, train_mode=True), task=Normed)
    with pytest.raises(Preempted, match="stopped in a fit, saved at epoch 1, step 0"):
        train(configure(stopped, train_mode=True), task=StoppedInFit)
    train(configure(stopped, train_mode=True), task=Normed)
    assert_same_run(stopped, whole)


def _broadcast() -> list[Tensor]:
    with process_group("cpu"):
        whole = torch.arange(6.0).reshape(2, 3) + 10 * rank()
        tensors = [whole.T, torch.tensor(3 + rank()), torch.tensor(rank() == 0), -whole]
        broadcast_tensors(tensors)
        broadcast_tensors([])
        return tensors


def test_tensors_of_rank_0_reach_all_in_any_shape_and_dtype() -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    for found in run_ranks(_broadcast, 2):
        expected = [whole.T, torch.tensor(3), torch.tensor(True), -whole]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
