"""Time what detection in large images spends: the backbone, a training step, the hash fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ecoformer.engine.precision import autocast
from ecoformer.hashing import fit_hash_functions
from ecoformer.models.dense import RetinaNet
from ecoformer.models.registry import find_family
from ecoformer.tools.benchmark.backbones import create_model
from ecoformer.tools.benchmark.comparison import Comparison, Contender, Setup, compare
from ecoformer.tools.benchmark.cores import count_tokens
from ecoformer.tools.benchmark.measurements import Measurement
from ecoformer.tools.measure import Call

BACKBONE, STEP, FIT = "backbone's maps, evaluation", "detection, training step", "hash fit"
_KINDS = ("ecoformer", "sra", "lsa_gsa", "msa")
# Of COCO: the shape that most images are brought to, its classes, and objects an image.
_SHORT_SIDE, _LONG_SIDE = 800, 1333
_NUM_CLASSES, _NUM_BOXES = 80, 7
# Pairs of tokens, over all images, from which on a step with softmax takes minutes.
_MAX_PAIRS = {"cpu": 2**30, "cuda": 2**38}


@dataclass(frozen=True)
class DenseInputs:
    """Random images of COCO's shape.

    Args:
        short_side: pixels; 800 makes 800 x 1,333.
    """

    batch_size: int
    short_side: int
    device: torch.device

    @property
    def long_side(self) -> int:
        return round(self.short_side * _LONG_SIDE / _SHORT_SIDE)

    @property
    def num_tokens(self) -> int:
        """Of the first stage."""
        return count_tokens(self.short_side, self.long_side)

    def draw_images(self) -> Tensor:
        """[B, 3, height, width]."""
        generator = torch.Generator().manual_seed(1)
        size = (self.batch_size, 3, self.short_side, self.long_side)
        return torch.randn(size, generator=generator).to(self.device)

    def draw_targets(self) -> list[dict[str, Tensor]]:
        """Boxes of half a side at most, of an image each."""
        generator = torch.Generator().manual_seed(2)
        sides = torch.tensor([self.long_side, self.short_side]).repeat(2)
        shares = torch.rand(self.batch_size, _NUM_BOXES, 4, generator=generator) / 2
        shares[..., 2:] += shares[..., :2] + 0.01
        labels = torch.arange(_NUM_BOXES, device=self.device)
        return [{"boxes": (one * sides).to(self.device), "labels": labels} for one in shares]


def build_maps(kind: str, variant: str, inputs: DenseInputs, dtype: torch.dtype) -> Call:
    """Prepare the forward of a backbone to the maps of all stages."""
    body = create_model(kind, variant).to(inputs.device).eval()
    images, give_maps = inputs.draw_images(), cast(Any, body).forward_intermediates

    @torch.inference_mode()
    def run() -> object:
        with autocast(inputs.device, dtype):
            return give_maps(images, intermediates_only=True)

    return run


def build_step(kind: str, variant: str, inputs: DenseInputs, dtype: torch.dtype) -> Call:
    """Prepare a step of RetinaNet: forward, loss, backward and AdamW."""
    model = RetinaNet(create_model(kind, variant), _NUM_CLASSES).to(inputs.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    images, targets = inputs.draw_images(), inputs.draw_targets()

    def step() -> None:
        with autocast(inputs.device, dtype):
            losses = model.loss(model(images), targets)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_model_fit(variant: str, inputs: DenseInputs) -> Call:
    """Prepare the fit of all hash functions of a backbone."""
    model = find_family(variant).create_model(variant, "ecoformer").to(inputs.device)
    images = inputs.draw_images()
    return lambda: fit_hash_functions(model, images, torch.Generator().manual_seed(0))


def measure_dense(
    setup: Setup, *, variant: str, batch_size: int, short_side: int
) -> Iterator[list[Measurement]]:
    """Compare kinds of attention as backbones of a detector; then time the fit, of one image."""
    inputs = DenseInputs(batch_size, short_side, setup.device)
    kinds = [kind for kind in _KINDS if kind in find_family(variant).kinds(variant)]
    is_slow = batch_size * inputs.num_tokens**2 > _MAX_PAIRS[setup.device.type]
    for task, build in ((BACKBONE, build_maps), (STEP, build_step)):
        comparison = Comparison(
            setup,
            f"{variant}, {task}",
            [
                Contender(
                    kind,
                    partial(build, kind, variant, inputs, setup.dtype),
                    why_not="takes minutes" if (kind, task) == ("msa", STEP) and is_slow else "",
                )
                for kind in kinds
            ],
            batch_size=batch_size,
            num_tokens=inputs.num_tokens,
            # The loss looks at its anchors on the host, which no graph can hold.
            is_captured=build is build_maps,
        )
        yield from compare(comparison)
    one = DenseInputs(1, short_side, setup.device)
    comparison = Comparison(
        setup,
        f"{variant}, {FIT}",
        [Contender("ecoformer", partial(build_model_fit, variant, one))],
        batch_size=1,
        num_tokens=one.num_tokens,
        is_captured=False,
    )
    yield from compare(comparison)
