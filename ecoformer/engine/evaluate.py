"""Accuracy and loss over every image exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecoformer.engine.compiling import vary_batch_size
from ecoformer.engine.logs import track
from ecoformer.engine.precision import autocast
from ecoformer.engine.signals import Request, agree, leave_at_signal
from ecoformer.errors import InputError, NonFiniteError, Preempted
from ecoformer.ranks import sum_over_ranks
from ecoformer.sums import ExactMean


class Batches(Sized, Iterable[tuple[Tensor, Tensor]], Protocol):
    """Images [B, 3, height, width], float, and labels [B], int64; of known number."""


@dataclass(frozen=True)
class Evaluation:
    """What a model got right.

    Args:
        num_images: images that were looked at, by all ranks together.
        num_top1: images whose label was the first guess.
        num_top5: images whose label was among the first five guesses, or among all of fewer.
        loss: mean cross-entropy.
    """

    num_images: int
    num_top1: int
    num_top5: int
    loss: float

    @property
    def acc1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.num_top1 / self.num_images

    @property
    def acc5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * self.num_top5 / self.num_images

    def __str__(self) -> str:
        return (
            f"top-1 {self.acc1:.2f} % ({self.num_top1} of {self.num_images}), "
            f"top-5 {self.acc5:.2f} %, loss {self.loss:.4f}"
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Batches, *, device: torch.device, amp_dtype: torch.dtype
) -> Evaluation:
    """Evaluate on this rank's batches, and add up over ranks.

    Ranks may have any number of batches, none too: they meet only after the last one. All sums
    are of integers, so one process and many give equal numbers.

    Args:
        model: the model, compiled or not, but not one wrapped for training on many ranks.
        batches: this rank's share of the images.
        device: where the model is.
        amp_dtype: from ``choose_amp_dtype``.

    Returns:
        Counts and mean loss over the images of all ranks, the same on each.

    Raises:
        InputError: no rank has an image.
        NonFiniteError: the loss of an image is not finite.
        Preempted: a signal asked for it.
    """
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    loss = ExactMean(device)

    def count() -> None:
        for images, labels in track(batches, "evaluate", total=len(batches)):
            images = vary_batch_size(images.to(device, non_blocking=True))
            labels = labels.to(device, non_blocking=True)
            with autocast(device, amp_dtype):
                logits = model(images).float()
            guesses = logits.topk(min(5, logits.shape[-1])).indices  # [B, 5]
            hits = guesses == labels.unsqueeze(-1)
            counts[0] += len(labels)
            counts[1:] += torch.stack([hits[:, 0].sum(), hits.sum()])
            loss.add(F.cross_entropy(logits, labels, reduction="none"))

    leave_at_signal(count)
    if agree() is Request.STOP:
        raise Preempted("stopped in an evaluation")
    num_images, num_top1, num_top5 = sum_over_ranks(counts).tolist()
    if not num_images:
        raise InputError("there is no image to evaluate on.")
    mean_loss = loss.mean()
    if mean_loss != mean_loss:
        raise NonFiniteError(
            "the model's output is not finite; check its weights, or evaluate with "
            "--amp-dtype none."
        )
    return Evaluation(num_images, num_top1, num_top5, mean_loss)
