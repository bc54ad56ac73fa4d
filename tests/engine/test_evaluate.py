"""Every image once, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecoformer.engine.launch import process_group
from ecoformer.errors import InputError, NonFiniteError
from ecoformer.ranks import rank, world_size
from ecoformer.tasks.classification import Accuracy
from tests.engine.ranks import run_ranks
from tests.engine.training import evaluate


class Rows(nn.Module):
    """Reads an image as logits, so that a test chooses the guesses."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def draw(num_images: int, num_classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_images)
    logits = torch.randn(num_images, num_classes, generator=generator)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    return logits, labels


def evaluate_share(num_images: int, batch_size: int, num_classes: int = 10) -> Accuracy:
    """This rank's images: number rank, rank + world_size, ..."""
    logits, labels = draw(num_images, num_classes)
    share = slice(rank(), None, world_size())
    logits, labels = logits[share], labels[share]
    batches = list(zip(logits.split(batch_size), labels.split(batch_size), strict=True))
    # Of nothing, split makes one empty batch; a loader makes none.
    batches = batches if len(labels) else []
    return evaluate(Rows(), batches)


def _evaluate_all(cases: list[tuple[int, int]]) -> list[Accuracy]:
    with process_group("cpu"):
        return [evaluate_share(*case) for case in cases]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_equal_one_process(num_ranks: int) -> None:
    cases = [(num_images, size) for num_images in (1, 2, 7, 50, 101) for size in (1, 4, 8)]
    alone = [evaluate_share(*case) for case in cases]
    assert [result.num_images for result in alone] == [case[0] for case in cases]
    for results in run_ranks(_evaluate_all, num_ranks, cases):
        # Losses too, to the last bit.
        assert results == alone


def test_counts_are_right() -> None:
    logits, labels = draw(50)
    order = logits.argsort(descending=True)
    result = evaluate_share(50, 8)
    pairs = list(zip(order, labels, strict=True))
    assert result.num_top1 == sum(int(row[0] == label) for row, label in pairs)
    assert result.num_top5 == sum(int(label in row[:5]) for row, label in pairs)
    assert result.acc1 == 2 * result.num_top1
    assert result.acc5 == 2 * result.num_top5
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)


def test_equal_logits_are_no_right_guess() -> None:
    batches = [(torch.zeros(10, 10), torch.arange(10))]
    result = evaluate(Rows(), batches)
    assert result.num_top1 == 1
    assert result.num_top5 == 5


def test_fewer_than_five_classes() -> None:
    assert evaluate_share(7, 4, num_classes=3).num_top5 == 7


def test_bad_output_is_no_accuracy() -> None:
    batches = [(torch.tensor([[1.0, float("nan")]]), torch.tensor([0]))]
    with pytest.raises(NonFiniteError, match="amp-dtype none"):
        evaluate(Rows(), batches)


def test_no_image() -> None:
    with pytest.raises(InputError, match="no image"):
        evaluate(Rows(), [])
