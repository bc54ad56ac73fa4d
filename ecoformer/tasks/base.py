"""What the engine asks of a task: data, a model, a loss and a measure.

Resuming, signals, ranks, precision, saves, NaN and refits of hash functions are the engine's. A
batch is any nest of tuples, lists and dicts, in which the engine only moves tensors to the device,
and unpacks there what is ``Packed``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ecoformer.checkpoint import LoadReport, load_checkpoint
from ecoformer.errors import NonFiniteError

if TYPE_CHECKING:
    from ecoformer.config import Config

# Called like the model; it computes in the run's precision, so what comes out may be of half.
Network = Callable[..., Any]


@runtime_checkable
class Packed(Protocol):
    """What takes fewer bytes on its way to the device than it has there."""

    def unpack(self, device: torch.device) -> Any:
        """Make it what the network takes, on the device, without waiting for that."""


class Batches(Protocol):
    """This rank's batches, on the CPU."""

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
    """What a run trains on, None to evaluate only, and is measured on, each sample once."""

    train: TrainBatches | None
    eval: Batches
    # For the log: "DIGITS: 1437 training and 360 validation images of 10 classes".
    summary: str = ""
    # What tells these data from others, by part, in plain values. A run that is resumed compares.
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """Measured values, by their names in ``log.txt``; the primary one says which epoch is best.

    It comes first, a loss aside: so pictures of a log find it.
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
        """Write the score of any epoch as the primary value, with its name and unit."""
        return f"{self.primary} {-score if self.is_lower_better else score:.4f}"

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.values.items())


class Meter(ABC):
    """One evaluation: takes this rank's batches, of which there may be none, then meets others."""

    @abstractmethod
    def add(self, network: Network, batch: Any) -> None:
        """Run a batch, on the device, and keep what counts; ranks must not meet in here.

        Tensors passed to ``network`` have the batch on their first axis.
        """

    @abstractmethod
    def finish(self) -> Metrics:
        """Join what all ranks have, by ``ecoformer.ranks``; the result is the same on each.

        Raises:
            InputError: no rank had a sample.
            NonFiniteError: the model's output is not finite.
        """


def non_finite_output() -> NonFiniteError:
    """Make the error of a model whose output is not finite."""
    return NonFiniteError(
        "the model's output is not finite; check its weights, or evaluate with --amp-dtype none."
    )


class Task(ABC):
    """What a run trains, by its completed configuration."""

    # What messages call what they count.
    samples = "samples"
    # Whether the network gives logits, [..., classes], which those of a teacher can replace labels.
    has_logits = False
    # What its models take, in a word of ``ModelFamily.inputs``; None: anything.
    inputs: str | None = None

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def open_data(self, device: torch.device, *, is_train: bool) -> Data:
        """Open this rank's share of the data, for evaluation alone or for both.

        Raises:
            InputError: the data are not there, or not as they should be.
        """

    @abstractmethod
    def create_model(self, create: Callable[..., nn.Module]) -> nn.Module:
        """Build the model on the CPU; ``open_data`` has been called unless it is only timed.

        ``create`` builds the configured backbone and takes what the task decides, such as
        ``num_classes``; a task may wrap what it gives, or do without.
        """

    def start_from(
        self, model: nn.Module, source: str | PathLike[str], *, allow_missing: bool
    ) -> LoadReport:
        """Load what ``--finetune`` names into a fresh model of this task.

        Raises:
            InputError: it cannot be read, or does not fit.
        """
        return load_checkpoint(model, source, allow_missing=allow_missing)

    def settings(self) -> Mapping[str, Any]:
        """What decides the result beside configuration and data, in plain values by name.

        Asked when the model is built. It joins the configuration in checkpoints, and a run that
        is resumed compares it.
        """
        return {}

    def prepare(self, batch: Any) -> Any:
        """Change a training batch on the device, by the global generators, seeded for the step."""
        return batch

    @abstractmethod
    def fit_inputs(self, batch: Any) -> Any:
        """Choose from a prepared batch what ``fit_hash_functions`` takes as inputs."""

    @abstractmethod
    def loss(self, network: Network, batch: Any) -> Tensor:
        """Mean loss of a prepared batch, [], float32 or float64."""

    @abstractmethod
    def start_evaluation(self, device: torch.device) -> Meter: ...

    @abstractmethod
    def draw_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Any, ...]:
        """Draw arguments of the model at random, on the CPU, to time it without data."""

    def describe_inputs(self) -> str:
        """The size of a sample in a word or two, such as ``"224 px"``."""
        return ""

    def name_samples(self, epoch: int, step: int) -> Mapping[str, Sequence[Any]]:
        """Name this rank's samples of a step, for the report of a bad one, as plain values.

        Such as ``{"image_indices": [3, 14]}``. Training is over by then: ``set_epoch`` is free.
        """
        return {}
