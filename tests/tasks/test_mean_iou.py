"""mIoU: checked by hand, and equal on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ecoformer.engine.launch import process_group
from ecoformer.errors import InputError
from ecoformer.ranks import rank, world_size
from ecoformer.tasks.mean_iou import MeanIou
from tests.engine.ranks import run_ranks

CPU = torch.device("cpu")


def draw_map(seed: int, num_classes: int = 7) -> tuple[Tensor, Tensor]:
    """Guesses and labels of one map, of a size of its own, a tenth of it ignored."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(num_classes, size=draw.integers(5, 40, size=2))
    guesses = np.where(draw.random(labels.shape) < 0.6, labels, draw.integers(num_classes))
    labels[draw.random(labels.shape) < 0.1] = 255
    return torch.from_numpy(guesses), torch.from_numpy(labels)


def test_checked_by_hand() -> None:
    meter = MeanIou(4, CPU)
    #       true  0: 3 of 4 found, once guessed in its place 1; union 4 + 1
    #             1: 1 of 2 found; union 2 + 1
    #             2: guessed for one of 1, nowhere true; union 1
    #             3: neither true nor guessed, so it does not count
    labels = torch.tensor([[0, 0, 0, 0], [1, 1, 255, 255]])
    guesses = torch.tensor([[0, 0, 0, 1], [1, 2, 3, 0]])
    meter.add(guesses, labels)
    assert meter.finish() == pytest.approx(
        {
            "mIoU": 100 * (3 / 4 + 1 / 3 + 0) / 3,
            "mAcc": 100 * (3 / 4 + 1 / 2) / 2,
            "aAcc": 100 * 4 / 6,
        }
    )


def test_as_sets_of_pixels_class_by_class() -> None:
    meter, guesses, labels = MeanIou(7, CPU), [], []
    for seed in range(10):
        one, other = draw_map(seed)
        # In maps or in batches, of any integers.
        meter.add(one.unsqueeze(0).to(torch.uint8), other.unsqueeze(0).to(torch.uint8))
        guesses.append(one.ravel())
        labels.append(other.ravel())
    true, guessed = np.concatenate(labels), np.concatenate(guesses)
    guessed = np.where(true == 255, 255, guessed)
    ious = [
        np.logical_and(true == k, guessed == k).sum() / np.logical_or(true == k, guessed == k).sum()
        for k in range(7)
    ]
    assert meter.finish()["mIoU"] == pytest.approx(100 * np.mean(ious), rel=1e-12)


def _measure(num_maps: int) -> dict[str, float]:
    with process_group("cpu"):
        meter = MeanIou(7, CPU)
        for seed in range(rank(), num_maps, world_size()):
            meter.add(*draw_map(seed))
        values = meter.finish()
        # Asking changes nothing.
        assert meter.finish() == values
        return values


@pytest.mark.parametrize("num_maps", [1, 5])
def test_ranks_change_nothing(num_maps: int) -> None:
    """Not a bit; with one map, other ranks have none."""
    alone = MeanIou(7, CPU)
    for seed in reversed(range(num_maps)):
        alone.add(*draw_map(seed))
    for size in (1, 2, 3):
        assert run_ranks(_measure, size, num_maps) == [alone.finish()] * size


def test_counts_of_a_large_data_set_stay_exact() -> None:
    meter = MeanIou(2, CPU)
    labels, guesses = torch.zeros((2, 6 * 10**6), dtype=torch.uint8)
    guesses[0] = 1
    for _ in range(3):
        meter.add(guesses, labels)
    # A float32 would hold 2^24 at most.
    num_pixels = 18 * 10**6
    assert num_pixels > 2**24
    assert meter.finish()["aAcc"] == 100 * (num_pixels - 3) / num_pixels


def test_nothing_labelled_is_refused() -> None:
    meter = MeanIou(2, CPU)
    meter.add(torch.zeros(3, 3, dtype=torch.long), torch.full((3, 3), 255))
    with pytest.raises(InputError, match="no labelled pixel"):
        meter.finish()
