"""What detection and segmentation share: heads over a backbone's maps, images of any size."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ecoformer.checkpoint import LoadReport, load_checkpoint, read_checkpoint
from ecoformer.checkpoint.layout import to_ours
from ecoformer.config.recipes import DENSE_WITHOUT_MEANING
from ecoformer.cost.count import without_data
from ecoformer.data import Loaders, load_splits
from ecoformer.data.datasets import LabelledSamples
from ecoformer.data.dense import STRIDE
from ecoformer.data.digits import SPLITS
from ecoformer.data.loaders import Collate, SampleTransform
from ecoformer.errors import InputError, describe_error
from ecoformer.hashing import hash_layers
from ecoformer.models.base import Backbone
from ecoformer.ranks import max_over_ranks, rank, world_size
from ecoformer.tasks.base import Meter, Metrics, non_finite_output
from ecoformer.tasks.loading import LoadedTask

# Where the networks have their backbone.
_BODY = "backbone.body"
# Of a batch, whose sides are multiples of ``STRIDE``; and of an image that hash functions are
# fitted on, which is not padded.
_TRIED_SIZES = (64, 96), (67, 93)


class DensePrediction(LoadedTask):
    """Batches begin with images [B, 3, H, W], float32, padded, and their sizes [B, 2], int64.

    Training sees the padding, as every network with convolutions does; a fit does not, and an
    evaluated image has that up to a multiple of 32 alone, whatever else is in its batch.

    Raises:
        InputError: a setting that has a meaning for classification alone.
    """

    samples = "images"
    inputs = "images"
    sizes: Sequence[str] = ("short_side", "long_side")
    without_meaning = DENSE_WITHOUT_MEANING

    def explain(self, off: object) -> str:
        return f"classification, and --task {self.config.run.task} has {off}; leave it out."

    @abstractmethod
    def open_split(self, split: str) -> LabelledSamples: ...

    @abstractmethod
    def build_transform(self, split: str) -> SampleTransform: ...

    @abstractmethod
    def collate(self) -> Collate: ...

    @abstractmethod
    def build_network(self, body: nn.Module, num_classes: int) -> nn.Module:
        """Put heads on a backbone, as its ``backbone.body``."""

    def open_loaders(self, *, is_train: bool, pin_memory: bool) -> Loaders:
        splits = SPLITS if is_train else ("val",)
        return load_splits(
            {split: self.open_split(split) for split in splits},
            {split: self.build_transform(split) for split in splits},
            self.config.data,
            seed=self.config.run.seed,
            rank=rank(),
            world_size=world_size(),
            pin_memory=pin_memory,
            collate=self.collate(),
        )

    @property
    def hflip(self) -> float:
        """Probability of a flip in training; a digit that is flipped is none."""
        return 0.0 if self.config.data.data_set == "SCENES" else self.config.augment.hflip

    def build_model(self, create: Callable[..., nn.Module], num_classes: int) -> nn.Module:
        body = create(num_classes=0)
        network = self.build_network(body, num_classes)
        if not isinstance(body, Backbone):
            self._require_any_size(body, network)
        return network

    def _require_any_size(self, body: nn.Module, network: nn.Module) -> None:
        """Refuse a backbone of one size of images before it meets another, without computing."""
        for size in _TRIED_SIZES if hash_layers(body) else _TRIED_SIZES[:1]:
            shadow, image = without_data(network, size)
            try:
                with torch.no_grad():
                    shadow(image)
            # It refuses in ways of its own.
            except Exception as error:
                name, advice = self.config.model.model, "name another --model, as pvt_v2_b0"
                if "strict_img_size" in inspect.signature(type(body)).parameters:
                    advice += ", or give --model-kwargs strict_img_size=False"
                raise InputError(
                    f"--task {self.config.run.task} has images of any size, which {name} does not "
                    f"take ({describe_error(error)}); {advice}."
                ) from error

    def start_from(
        self, model: nn.Module, source: str | PathLike[str], *, allow_missing: bool
    ) -> LoadReport:
        """Load a network of this task, whole, or a classifier into the backbone alone."""
        checkpoint, origin = read_checkpoint(source), str(source)
        is_whole = any(name.startswith(f"{_BODY}.") for name in to_ours(checkpoint["model"]))
        report = load_checkpoint(
            model if is_whole else model.get_submodule(_BODY),
            checkpoint,
            allow_missing=allow_missing,
            origin=origin,
        )
        fresh = () if is_whole else ("All behind the backbone is fresh",)
        return replace(report, notes=(*checkpoint.notes, *report.notes, *fresh))

    def fit_inputs(self, batch: Any) -> Tensor:
        """The largest image, and those of its size, without padding."""
        images, sizes, *_ = batch
        largest = sizes[sizes.prod(-1).argmax()]
        height, width = largest.tolist()
        return images[(sizes == largest).all(-1), :, :height, :width]

    @property
    def input_sides(self) -> tuple[int, int]:
        """Height and width of the images that a model is timed with."""
        return self.config.data.short_side, self.config.data.short_side

    def draw_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(batch_size, 3, *self.input_sides, generator=generator),)

    def describe_inputs(self) -> str:
        return "{} x {} px".format(*self.input_sides)


class DenseMeter(Meter):
    """Runs each image alone: what a network says of it depends on no other, on any rank."""

    def __init__(self, device: torch.device) -> None:
        self._is_bad = torch.zeros((), dtype=torch.int64, device=device)

    def check(self, *outputs: Tensor) -> None:
        """Remember whether any was not finite: it would be counted as a wrong guess."""
        for output in outputs:
            self._is_bad |= (~output.isfinite()).any()

    def finish(self) -> Metrics:
        if max_over_ranks(int(self._is_bad)):
            raise non_finite_output()
        return self.measure()

    @abstractmethod
    def measure(self) -> Metrics:
        """Join what all ranks have; an InputError where no rank had an image."""


def cut_out(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Leave no more padding to an image [3, H, W] than a backbone asks for: [1, 3, h, w]."""
    height, width = (-(-side // STRIDE) * STRIDE for side in size)
    return image[None, :, :height, :width]
