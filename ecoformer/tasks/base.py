"""What the engine asks of a task.

A task brings data, a model, a loss and a measure. Resuming, signals, ranks, precision, saves, NaN
and refits of hash functions are the engine's, for every task alike. A batch is any nest of tuples,
lists and dicts; the engine looks at nothing in it and moves its tensors to the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ecoformer.config import Config

# The model as the engine hands it to a task: called like the model, it computes in the run's
# precision, so what comes out may be of half precision.
Network = Callable[..., Any]


class Batches(Protocol):
    """This rank's batches of one split, tensors on the CPU; ranks may have different numbers."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class TrainBatches(Batches, Protocol):
    """Batches that a run can resume: each a function of (seed, epoch, step, rank) alone.

    All ranks have the same number.
    """

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Let the next iteration begin at a step of an epoch; ``len`` stays the whole epoch's."""


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured on.

    Args:
        train: None where only evaluation was asked for.
        eval: each sample once, over all ranks.
        summary: one phrase for the log, such as ``"DIGITS: 1437 training and 360 ..."``.
    """

    train: TrainBatches | None
    eval: Batches
    summary: str = ""


@dataclass(frozen=True)
class Metrics:
    """What a model is worth on the data it was measured on, equal on all ranks.

    Args:
        values: by their names in ``log.txt``.
        primary: the name of the value that says which epoch is best.
        is_lower_better: of the primary value.
    """

    values: Mapping[str, float]
    primary: str
    is_lower_better: bool = False

    @property
    def score(self) -> float:
        """The primary value, turned so that more is better."""
        value = self.values[self.primary]
        return -value if self.is_lower_better else value

    def format_score(self, score: float) -> str:
        """Write a score, of this epoch or another, with its name and unit."""
        return f"{self.primary} {-score if self.is_lower_better else score:.4f}"

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.values.items())


class Meter(ABC):
    """One evaluation: takes this rank's batches, then meets the other ranks."""

    @abstractmethod
    def add(self, network: Network, batch: Any) -> None:
        """Run a batch, on the device, and keep what counts; ranks must not meet in here.

        Tensors passed to ``network`` have the batch on their first axis.
        """

    @abstractmethod
    def finish(self) -> Metrics:
        """Bring all ranks' counts together (``sum_over_ranks``, ``gather_objects``).

        Called once, on every rank, also on one that had no batch.

        Raises:
            InputError: no rank had a sample.
            NonFiniteError: the model's output is not finite.
        """


class Task(ABC):
    """What a run trains.

    Args:
        config: of the run, completed.
    """

    # What messages call what they count.
    samples: ClassVar[str] = "samples"

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def open_data(self, device: torch.device, *, is_train: bool) -> Data:
        """Open the data, or only those for evaluation; ``ecoformer.ranks`` tells this rank's share.

        Raises:
            InputError: the data are not there, or not as they should be.
        """

    @abstractmethod
    def create_model(self, create: Callable[..., nn.Module]) -> nn.Module:
        """Build the model with fresh weights, on the CPU.

        Called after ``open_data``, or without it where a model is only timed.

        Args:
            create: builds the configured backbone with its attention and rates; takes what the
                task decides, such as ``num_classes``. A task may wrap its result, or do without.
        """

    def prepare(self, batch: Any) -> Any:
        """Change a training batch on the device, drawing from the global generators.

        They are seeded by (seed, epoch, step, rank) just before.
        """
        return batch

    @abstractmethod
    def fit_inputs(self, batch: Any) -> Any:
        """Choose what hash functions are fitted on: inputs of the model, from a prepared batch."""

    @abstractmethod
    def loss(self, network: Network, batch: Any) -> Tensor:
        """Mean loss of a prepared batch, [], float32 or float64."""

    @abstractmethod
    def start_evaluation(self, device: torch.device) -> Meter: ...

    @abstractmethod
    def draw_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Any, ...]:
        """Draw arguments of the model at random, on the CPU, to time it without data."""

    def describe_inputs(self) -> str:
        """Say in a word or two how large a sample is, such as ``"224 px"``."""
        return ""

    def name_samples(self, epoch: int, step: int) -> Mapping[str, Sequence[Any]]:
        """Name what this rank's batch of a training step holds, for the report of a bad step.

        The data may be moved to that step: training is over when this is asked.

        Returns:
            Key of the report to plain values, such as ``{"image_indices": [3, 14]}``.
        """
        return {}
