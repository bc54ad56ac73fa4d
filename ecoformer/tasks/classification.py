"""Image classification: cross-entropy, mixup, top-1 and top-5."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecoformer.data import Loaders, build_loaders
from ecoformer.errors import InputError
from ecoformer.ops import as_full_precision
from ecoformer.ranks import rank, sum_over_ranks, world_size
from ecoformer.sums import ExactMean
from ecoformer.tasks.base import Meter, Metrics, Network, non_finite_output
from ecoformer.tasks.loading import LoadedTask


@dataclass(frozen=True, kw_only=True)
class Accuracy(Metrics):
    """Images of all ranks, and those whose label was the first guess, or among the first five."""

    num_images: int
    num_top1: int
    num_top5: int

    @classmethod
    def count(cls, num_images: int, num_top1: int, num_top5: int, loss: float) -> Accuracy:
        """Turn counts into percent, beside the mean cross-entropy."""
        values = {
            "test_loss": loss,
            "test_acc1": 100 * num_top1 / num_images,
            "test_acc5": 100 * num_top5 / num_images,
        }
        return cls(values, "test_acc1", num_images=num_images, num_top1=num_top1, num_top5=num_top5)

    @property
    def loss(self) -> float:
        return self.values["test_loss"]

    @property
    def acc1(self) -> float:
        return self.values["test_acc1"]

    @property
    def acc5(self) -> float:
        return self.values["test_acc5"]

    def format_score(self, score: float) -> str:
        return f"top-1 {score:.2f} %"

    def __str__(self) -> str:
        return (
            f"top-1 {self.acc1:.2f} % ({self.num_top1} of {self.num_images}), "
            f"top-5 {self.acc5:.2f} %, loss {self.loss:.4f}"
        )


class AccuracyMeter(Meter):
    """Counts in integers, so that one process and many give equal numbers."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # images, top-1, top-5
        self._loss = ExactMean(device)

    def add(self, network: Network, batch: Any) -> None:
        *inputs, labels = batch
        logits = as_full_precision(network(*inputs))
        guesses = logits.topk(min(5, logits.shape[-1])).indices  # [B, 5]
        hits = guesses == labels.unsqueeze(-1)
        self._counts[0] += len(labels)
        self._counts[1:] += torch.stack([hits[:, 0].sum(), hits.sum()])
        self._loss.add(F.cross_entropy(logits, labels, reduction="none"))

    def finish(self) -> Accuracy:
        num_images, num_top1, num_top5 = sum_over_ranks(self._counts).tolist()
        if not num_images:
            raise InputError("there is no image to evaluate on.")
        loss = self._loss.mean()
        if math.isnan(loss):
            raise non_finite_output()
        return Accuracy.count(num_images, num_top1, num_top5, loss)


class Classification(LoadedTask):
    """Batches are images [B, 3, height, width], float32, and labels [B], int64.

    Images are packed, as a ``PictureBatch``, until they are on the device. Mixup turns labels into
    targets [B, classes], float32, that are smoothed already.
    """

    samples = "images"
    has_logits = True
    inputs: str | None = "images"
    default_classes = 1000
    sizes = ("input_size",)

    def open_loaders(self, *, is_train: bool, pin_memory: bool) -> Loaders:
        """Open the splits; of a batch, the labels are the last."""
        return build_loaders(
            self.config.data,
            self.config.augment,
            input_size=self.config.model.input_size,
            seed=self.config.run.seed,
            rank=rank(),
            world_size=world_size(),
            pin_memory=pin_memory,
            train=is_train,
        )

    def build_model(self, create: Callable[..., nn.Module], num_classes: int) -> nn.Module:
        return create(num_classes=num_classes)

    def prepare(self, batch: Any) -> Any:
        mixup = self._loaders.mixup if self._loaders else None
        return batch if mixup is None else mixup(*batch)

    def fit_inputs(self, batch: Any) -> Any:
        return batch[0]

    def loss(self, network: Network, batch: Any) -> Tensor:
        *inputs, targets = batch
        logits = as_full_precision(network(*inputs))
        is_mixed = targets.is_floating_point()
        smoothing = 0.0 if is_mixed else self.config.augment.smoothing
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def start_evaluation(self, device: torch.device) -> AccuracyMeter:
        return AccuracyMeter(device)

    def draw_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor]:
        side = self.config.model.input_size
        return (torch.randn(batch_size, 3, side, side, generator=generator),)

    def describe_inputs(self) -> str:
        return f"{self.config.model.input_size} px"
