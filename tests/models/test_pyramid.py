"""The parts that backbones share, against their formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecoformer.models.base import Block, PatchEmbed
from ecoformer.models.pyramid import Pyramid
from tests.problems import draw

SIZE = (3, 5)


class Double(nn.Module):
    """A branch that a test can follow."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        assert size == SIZE
        return 2 * x


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kernel_size": 7, "stride": 4, "padding": 3}, (6, 3)),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, (11, 6)),
        ({"kernel_size": 4, "stride": 4}, (5, 2)),
    ],
)
def test_patches_run_row_by_row(options: dict[str, Any], expected: tuple[int, int]) -> None:
    embed, image = PatchEmbed(3, 8, **options).double(), draw(2, 3, 21, 11)
    tokens, size = embed(image)
    assert size == expected
    patches = F.conv2d(
        image,
        embed.proj.weight,
        embed.proj.bias,
        stride=options["stride"],
        padding=options.get("padding", 0),
    )
    rows = torch.stack([patches[..., i // size[1], i % size[1]] for i in range(tokens.shape[1])], 1)
    torch.testing.assert_close(tokens, F.layer_norm(rows, (8,), eps=1e-5))


def test_a_block_adds_two_normalised_branches() -> None:
    block, x = Block(8, Double(), Double()).double(), draw(2, 15, 8)
    x_attended = x + 2 * F.layer_norm(x, (8,), eps=1e-6)
    expected = x_attended + 2 * F.layer_norm(x_attended, (8,), eps=1e-6)
    torch.testing.assert_close(block(x, SIZE), expected)


def test_drop_path_skips_branches_of_samples_in_training_only() -> None:
    block, x = Block(8, Double(), Double(), drop_path=0.5).double(), draw(64, 15, 8)
    torch.manual_seed(0)
    is_skipped = (block.train()(x, SIZE) == x).flatten(1).all(1)
    # Both branches of a quarter of the samples.
    assert 6 <= is_skipped.sum() <= 28
    assert not (block.eval()(x, SIZE) == x).flatten(1).all(1).any()


def test_a_backbone_classifies_the_mean_token() -> None:
    class Tokens(Pyramid):
        def forward_stage(self, x: Tensor, stage: int) -> Tensor:
            return x

    model, images = Tokens((8,), 3).double(), draw(2, 8, *SIZE)
    torch.testing.assert_close(model(images), model.get_classifier()(images.mean((2, 3))))
