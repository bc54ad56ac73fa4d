"""A task that is no classification: one number for a sequence of vectors, through codes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecoformer import EcoFormerAttention
from ecoformer.config import Config
from ecoformer.engine import train as loop
from ecoformer.engine.state import TrainState
from ecoformer.errors import InputError
from ecoformer.ranks import gather_objects, rank, world_size
from ecoformer.seeding import derive_seed
from ecoformer.tasks.base import Data, Meter, Metrics, Network, Task
from tests.tiny import TINY_HASH

NUM_EPOCHS, NUM_STEPS, NUM_HELD_OUT, LENGTH, DIM = 3, 4, 11, 16, 8


class ToyModel(nn.Module):
    """[B, N, 8] to [B], by an EcoFormer layer, dropout and a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = EcoFormerAttention(DIM, 2, hashing=TINY_HASH)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(DIM, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens + self.attention(tokens)
        out: Tensor = self.head(self.drop(x).mean(1)).squeeze(-1)
        return out


def draw_sample(*place: int | str) -> dict[str, Tensor]:
    """Tokens [N, 8] and the mean of their first channel, [], for a place in the data."""
    generator = torch.Generator().manual_seed(derive_seed("toy", *place))
    tokens = torch.randn(LENGTH, DIM, generator=generator) + torch.randn(DIM, generator=generator)
    return {"tokens": tokens, "target": tokens[:, 0].mean()}


def stack(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples side by side."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


class ToyBatches:
    """Batches of fresh samples; which ones follows from seed, epoch, step and rank."""

    epoch = start_step = 0

    def __init__(self, config: Config) -> None:
        self.config = config

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def numbers(self, step: int) -> list[int]:
        """Of the samples of a step."""
        size = self.config.data.batch_size
        first = (step * world_size() + rank()) * size
        return list(range(first, first + size))

    def __len__(self) -> int:
        return NUM_STEPS

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self.start_step, NUM_STEPS):
            place = self.config.run.seed, self.epoch
            yield stack([draw_sample(*place, number) for number in self.numbers(step)])


class ToyMeter(Meter):
    """Needs the predictions of all ranks in one place: a rank correlation is no sum."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []

    def add(self, network: Network, batch: dict[str, Tensor]) -> None:
        guesses = network(tokens=batch["tokens"]).float()
        self.pairs += zip(guesses.tolist(), batch["target"].tolist(), strict=True)

    def finish(self) -> Metrics:
        pairs = sorted(pair for pairs in gather_objects(self.pairs) for pair in pairs)
        if not pairs:
            raise InputError("there is no sequence to evaluate on.")
        guesses, targets = torch.tensor(pairs, dtype=torch.float64).T
        order = torch.stack([guesses.argsort().argsort(), targets.argsort().argsort()]).double()
        values = {
            "test_error": (guesses - targets).square().mean().item(),
            "test_correlation": torch.corrcoef(order)[0, 1].item(),
            "num_sequences": float(len(pairs)),
        }
        return Metrics(values, "test_error", is_lower_better=True)


class Toy(Task):
    """Batches are dicts of tokens [B, N, 8] and targets [B], both float32."""

    samples = "sequences"

    def open_data(self, device: torch.device, *, is_train: bool) -> Data:
        self.batches = ToyBatches(self.config)
        mine = range(rank(), NUM_HELD_OUT, world_size())
        held_out = [stack([draw_sample("val", number)]) for number in mine]
        return Data(self.batches if is_train else None, held_out, "toy sequences")

    def create_model(self, create: Callable[..., nn.Module]) -> nn.Module:
        return ToyModel()

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        noise = 0.1 * torch.randn_like(batch["tokens"])
        return {**batch, "tokens": batch["tokens"] + noise}

    def fit_inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"tokens": batch["tokens"]}

    def loss(self, network: Network, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(network(tokens=batch["tokens"]).float(), batch["target"])

    def start_evaluation(self, device: torch.device) -> Meter:
        return ToyMeter()

    def draw_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Any, ...]:
        return (torch.randn(batch_size, LENGTH, DIM, generator=generator),)

    def name_samples(self, epoch: int, step: int) -> Mapping[str, Sequence[Any]]:
        return {"sequences": self.batches.numbers(step)}


class Ragged(Toy):
    """The same with sequences of any length: a list of tensors and a list of dicts."""

    def open_data(self, device: torch.device, *, is_train: bool) -> Data:
        data = super().open_data(device, is_train=is_train)
        return Data(RaggedBatches(self.config), [cut(batch) for batch in data.eval])

    def create_model(self, create: Callable[..., nn.Module]) -> nn.Module:
        return RaggedModel()

    def prepare(self, batch: Any) -> Any:
        return batch

    def fit_inputs(self, batch: Any) -> Any:
        raise AssertionError("there is nothing to fit")

    def loss(self, network: Network, batch: Any) -> Tensor:
        sequences, targets = batch
        return F.mse_loss(network(sequences), torch.stack([target["mean"] for target in targets]))

    def start_evaluation(self, device: torch.device) -> Meter:
        return RaggedMeter()


class RaggedMeter(ToyMeter):
    """Of lists."""

    def add(self, network: Network, batch: Any) -> None:
        sequences, targets = batch
        means = [target["mean"].item() for target in targets]
        self.pairs += zip(network(sequences).tolist(), means, strict=True)


class RaggedModel(nn.Module):
    """A list of [N, 8] to [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(DIM, 1)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        out: Tensor = self.head(torch.stack([x.mean(0) for x in sequences])).squeeze(-1)
        return out


class RaggedBatches(ToyBatches):
    """Sequences of different lengths."""

    def __iter__(self) -> Iterator[Any]:
        return (cut(batch) for batch in super().__iter__())


def cut(batch: dict[str, Tensor]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Give every sequence its own length."""
    tokens = batch["tokens"]
    sequences = [sequence[: LENGTH - number] for number, sequence in enumerate(tokens)]
    return sequences, [{"mean": target} for target in batch["target"]]


def configure(folder: Path, **fields: Any) -> Config:
    """Three epochs of four steps, each with a fit, on the CPU."""
    return Config.from_flat(
        {
            **{"model": "toy", "output_dir": str(folder), "device": "cpu", "batch_size": 4},
            **{"epochs": NUM_EPOCHS, "warmup_epochs": 0, "lr": 5.0, "min_lr": 0.0, "opt": "adamw"},
            **{"refit_every_epochs": 1, **fields},
        }
    )


def stop_at(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM to this process in its n-th update, from 0."""
    real, count = loop.update_weights, -1

    def update_weights(state: TrainState, clip_grad: float | None) -> Tensor:
        nonlocal count
        count += 1
        if count == update:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, clip_grad)

    monkeypatch.setattr(loop, "update_weights", update_weights)
