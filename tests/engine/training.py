"""Parts of a training run, put together without a command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ecoformer.checkpoint import read_checkpoint
from ecoformer.config import Config
from ecoformer.engine.evaluate import measure
from ecoformer.engine.folder import RunFolder
from ecoformer.engine.precision import choose_amp_dtype
from ecoformer.engine.saving import Saver
from ecoformer.engine.session import Session
from ecoformer.engine.state import TrainState
from ecoformer.engine.train import parallelize, train_epoch
from ecoformer.tasks.base import Data
from ecoformer.tasks.classification import Accuracy, Classification

Batch = tuple[Tensor, Tensor]

CPU = torch.device("cpu")


class Classifier(nn.Module):
    """Small enough to think about."""

    def __init__(self, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Linear(3 * 32 * 32, 8)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(8, 2)
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(self.body(images.flatten(1)).tanh()))
        return out


class ListLoader:
    """Batches from a list, in the order given, in every epoch."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.start_step = 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.start_step = start_step

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches[self.start_step :])


def make_batches(
    num_batches: int, batch_size: int, *, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Images [batch_size, 3, 32, 32] and labels of two classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(batch_size, 3, 32, 32, generator=generator),
            torch.randint(2, (batch_size,), generator=generator),
        )
        for _ in range(num_batches)
    ]


def start(model: nn.Module, **fields: Any) -> tuple[TrainState, Config]:
    """A fresh state: plain SGD with a rate of 0.1, unless the fields say otherwise."""
    plain = {"opt": "momentum", "momentum": 0.0, "weight_decay": 0.0, "warmup_epochs": 0}
    # The base rate is for 512 images an update.
    rate = 0.1 * 512 / (fields.get("batch_size", 32) * fields.get("grad_accum_steps", 1))
    config = Config.from_flat({**plain, "smoothing": 0.0, "lr": rate, **fields})
    return start_as_configured(model, config), config


def start_as_configured(model: nn.Module, config: Config) -> TrainState:
    """A fresh state of a run on the CPU."""
    amp_dtype = choose_amp_dtype(config.run.amp_dtype, CPU)
    return TrainState.create(model, config, device=CPU, amp_dtype=amp_dtype)


def open_session(config: Config, batches: Sequence[Batch]) -> Session:
    """Classification of a list of batches, on the CPU."""
    loader = ListLoader(batches)
    amp_dtype = choose_amp_dtype(config.run.amp_dtype, CPU)
    return Session(config, Classification(config), Data(loader, loader), CPU, amp_dtype)


def train(state: TrainState, config: Config, batches: Sequence[Batch]) -> None:
    """One epoch over a list of batches, on all ranks there are."""
    session = open_session(config, batches)
    train_epoch(
        session,
        state,
        parallelize(state.model, CPU),
        Saver(state, config, RunFolder(session.folder)),
    )


def evaluate(model: nn.Module, batches: Sequence[Batch]) -> Accuracy:
    """Measure a model on a list of batches, of this rank among all."""
    return cast(Accuracy, measure(open_session(Config(), batches), model))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Two state dicts are the same to the last bit."""
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested containers by path."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    return {k: v for key, item in items for k, v in flatten(item, f"{prefix}/{key}").items()}


def assert_same_state(first: Path, second: Path) -> None:
    """Two checkpoints are equal, but for where they lie and how they were computed."""
    one, other = (flatten(read_checkpoint(path)) for path in (first, second))
    assert one.keys() == other.keys()
    free = {f"/config/{name}" for name in ("output_dir", "num_workers", "dist_timeout")}
    # All of them, and by how much: that tells where to look.
    differences = [
        tell_difference(name, one[name], other[name])
        for name in one
        if name not in free and not is_equal(one[name], other[name])
    ]
    assert not differences


def assert_same_run(one: Path, other: Path) -> None:
    """What two folders hold of their runs is equal, but for what may differ."""
    for name in ("last_checkpoint.pth", "best_checkpoint.pth"):
        assert_same_state(one / name, other / name)
    assert (one / "log.txt").read_bytes() == (other / "log.txt").read_bytes()


def is_equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def tell_difference(name: str, one: Any, other: Any) -> str:
    if not isinstance(one, Tensor):
        return f"{name}: {one}, {other}"
    if one.shape != other.shape:
        return f"{name}: {one.shape}, {other.shape}"
    places = (one != other).nonzero()
    values = [(one[place].item(), other[place].item()) for place in map(tuple, places[:3])]
    return f"{name}: {len(places)} of {one.numel()}, first {values}"
