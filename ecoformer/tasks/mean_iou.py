"""Intersection over union of label maps, from counts of pixels over all ranks."""

from __future__ import annotations

from math import fsum

import torch
from torch import Tensor

from ecoformer.errors import InputError
from ecoformer.ranks import sum_over_ranks


class MeanIou:
    """Counts pixels by true and guessed label, in integers, so that ranks change nothing."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        # True label, guess.
        self._counts = torch.zeros(num_classes**2, dtype=torch.int64, device=device)

    def add(self, guesses: Tensor, labels: Tensor) -> None:
        """Count pixels [...], integers; those whose label is no class's, as 255, are left out."""
        is_counted = (labels >= 0) & (labels < self.num_classes)
        pairs = labels[is_counted].long() * self.num_classes + guesses[is_counted].long()
        self._counts += torch.bincount(pairs, minlength=self.num_classes**2)

    def finish(self) -> dict[str, float]:
        """Measure what all ranks counted, in percent; each must ask, and gets the same.

        ``mIoU`` is the mean over the classes that are true or guessed anywhere, ``mAcc`` the mean
        share of its pixels that are found over the true ones, ``aAcc`` the share of all pixels.

        Raises:
            InputError: no rank had a pixel with a label.
        """
        counts = sum_over_ranks(self._counts.clone()).cpu().view(self.num_classes, -1)
        hits, true, guessed = counts.diag().tolist(), counts.sum(1).tolist(), counts.sum(0).tolist()
        if not sum(true):
            raise InputError("there is no labelled pixel to evaluate on.")
        found = [(h, t, t + g - h) for h, t, g in zip(hits, true, guessed, strict=True) if t + g]
        ious = [h / union for h, _, union in found]
        shares = [h / t for h, t, _ in found if t]
        return {
            "mIoU": 100 * fsum(ious) / len(ious),
            "mAcc": 100 * fsum(shares) / len(shares),
            "aAcc": 100 * sum(hits) / sum(true),
        }
