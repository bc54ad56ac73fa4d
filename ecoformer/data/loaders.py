"""Batches of a run: each a function of (seed, epoch, step, rank), however it is loaded."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ecoformer.data.datasets import FORMATS, Fingerprint, LabelledSamples, open_dataset
from ecoformer.data.digits import SPLITS
from ecoformer.data.pixels import Picture, collate_pictures
from ecoformer.data.transforms import (
    Transform,
    build_eval_transform,
    build_mixup,
    build_plain_transform,
    build_train_transform,
)
from ecoformer.data.workers import WorkerWatch, prepare_worker
from ecoformer.errors import InputError
from ecoformer.seeding import restored_generators, seed_host

if TYPE_CHECKING:
    from timm.data import Mixup

    from ecoformer.config.schema import AugmentConfig, DataConfig
    from ecoformer.data.samplers import Draw, DrawBatches

# What a network takes, in an order of its own, and the labels [B], int64, last.
Batch = tuple[Any, ...]
# Changes what was read, and its label with it.
SampleTransform = Callable[[Any, Any], tuple[Any, Any]]
# Makes a batch of samples, each what the transform gave.
Collate = Callable[[list[tuple[Any, Any]]], Batch]

_logger = logging.getLogger(__name__)

# Number of an image that cannot be read, and why.
BadImage = tuple[int, str]


class _Sample(NamedTuple):
    """What was read, and its label, None after too many bad ones; and the bad ones before it."""

    content: tuple[Any, Any] | None
    bad: list[BadImage]


class SampleReader(Dataset[_Sample]):
    """Read and transform a drawn image; the next one in its place where it cannot be read.

    A draw seeds the CPU's global generators for what is read and its transform. At most
    ``max_bad_images`` are passed over for one.
    """

    def __init__(
        self, images: LabelledSamples, transform: SampleTransform, *, max_bad_images: int
    ) -> None:
        self.images = images
        self.transform = transform
        self.max_bad_images = max_bad_images

    def __getitem__(self, draw: Draw) -> _Sample:
        index, bad = draw.image, list[BadImage]()
        while len(bad) <= self.max_bad_images:
            seed_host(draw.seed)
            try:
                image, label = self.images.read(index)
            # Pillow raises whatever its decoders meet.
            except Exception as error:
                bad.append((index, describe_failure(error)))
                index = (index + 1) % len(self.images)
                continue
            return _Sample(self.transform(image, label), bad)
        return _Sample(None, bad)

    def __getitems__(self, draws: list[Draw]) -> list[_Sample]:
        """Read a batch. Generators of a process that only reads are nobody's; others come back."""
        with nullcontext() if get_worker_info() else restored_generators():
            return [self[draw] for draw in draws]


class Loader:
    """The batches of one split on one rank; each iteration is an epoch, or the rest of one.

    Neither the number of workers nor what was read before changes a batch. Reading draws from no
    generator of the caller.

    Args:
        batches: which images, when, and their seeds.
        collate: makes a ``PictureBatch`` of what image transforms give, unless it is given.
        num_workers: processes that read; 0 reads in this one.
        pin_memory: page-lock batches, for a faster way to a GPU.
        max_bad_images: different images that may be replaced by the next one before the run stops.
    """

    def __init__(
        self,
        images: LabelledSamples,
        transform: SampleTransform,
        batches: DrawBatches,
        *,
        num_workers: int,
        pin_memory: bool = False,
        max_bad_images: int = 0,
        collate: Collate = collate_pictures,
    ) -> None:
        self.images = images
        self.batches = batches
        # One image at least must be left to take the others' place.
        self.max_bad_images = min(max_bad_images, len(images) - 1)
        self.bad_images: dict[int, str] = {}
        self._watch = WorkerWatch()
        # A forked worker starts in milliseconds and shares the parent's modules and file names.
        context = "fork" if num_workers and sys.platform == "linux" else None
        self._loader = DataLoader(
            SampleReader(images, transform, max_bad_images=self.max_bad_images),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=partial(_join, collate),
            pin_memory=pin_memory,
            worker_init_fn=prepare_worker,
            multiprocessing_context=context,
            persistent_workers=num_workers > 0,
            # Its own, so that the first iteration does not draw from the caller's.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return len(self.batches)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration, and the batches that it leaves out, as seen."""
        self.batches.set_epoch(epoch, start_step)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches, a tuple each.

        Raises:
            InputError: more images than allowed cannot be read, or a worker was killed.
        """
        for batch, bad in self._watch.iterate(self._loader):
            for index, reason in bad:
                self._count(index, reason)
            assert batch is not None
            yield tuple(batch)

    def _count(self, index: int, reason: str) -> None:
        if index in self.bad_images:
            return
        self.bad_images[index] = reason
        found = f"cannot read {self.images.describe(index)} ({reason})"
        if len(self.bad_images) > self.max_bad_images:
            raise InputError(
                f"{found}; replace or delete it. Training skips up to --max-bad-images such files, "
                "evaluation none."
            )
        _logger.warning("%s; the next image takes its place.", found)


@dataclass(frozen=True)
class Loaders:
    """The data of a run: ``train`` is None for evaluation alone, ``mixup`` where it is off.

    ``class_names`` are in the order of the labels.
    """

    train: Loader | None
    eval: Loader
    class_names: Sequence[str]
    mixup: Mixup | None

    def fingerprint(self) -> dict[str, Fingerprint]:
        """Identify the images of each split that is there, in plain values for a checkpoint."""
        loaders = {"train": self.train, "val": self.eval}
        return {split: one.images.fingerprint() for split, one in loaders.items() if one}

    @property
    def num_classes(self) -> int:
        """Number of classes that the labels tell apart."""
        return len(self.class_names)


def build_loaders(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    input_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    train: bool = True,
) -> Loaders:
    """Open the data and build this rank's loaders of them.

    Args:
        data: no more workers are started than cores, which would only get in each other's way.
        seed: of order and augmentation; the same on all ranks.
        pin_memory: whether batches go to a CUDA device, so that ``data.pin_mem`` has a meaning.
        train: whether to open the training images; evaluation alone needs none.

    Raises:
        InputError: the data are not there, or not as they should be.
    """
    splits = SPLITS if train else ("val",)
    images = {
        split: open_dataset(data.data_set, data.data_path, split, input_size=input_size)
        for split in splits
    }
    is_canvas = data.data_set == "PAIRS"
    transforms = dict.fromkeys(splits, build_plain_transform())
    if not is_canvas:
        transforms["val"] = build_eval_transform(input_size)
    if train and not is_canvas:
        transforms["train"] = build_train_transform(augment, input_size=input_size)
    mixup = build_mixup(augment, num_classes=len(images["val"].class_names)) if train else None
    if mixup and is_canvas:
        raise InputError(
            "the label of a canvas of PAIRS is that of all its items together, so that none can be "
            "mixed with another; give --mixup 0 --cutmix 0."
        )
    if mixup and data.batch_size % 2:
        raise InputError(
            f"--batch-size {data.batch_size} is odd, and Mixup pairs images; make it even, or give "
            "--mixup 0 --cutmix 0."
        )
    loaders = load_splits(
        images,
        {split: keep_label(transform) for split, transform in transforms.items()},
        data,
        seed=seed,
        rank=rank,
        world_size=world_size,
        pin_memory=pin_memory,
    )
    return replace(loaders, mixup=mixup)


def load_splits(
    samples: Mapping[str, LabelledSamples],
    transforms: Mapping[str, SampleTransform],
    data: DataConfig,
    *,
    seed: int,
    rank: int,
    world_size: int,
    pin_memory: bool,
    collate: Collate = collate_pictures,
) -> Loaders:
    """Build this rank's loaders of the splits that are there, without mixup.

    Args:
        samples: ``"val"``, and ``"train"`` unless it is to evaluate alone.
        seed, pin_memory: as for ``build_loaders``.

    Raises:
        InputError: the splits have different classes, or too few samples for a batch; or a length
            of epochs is given that repeated augmentation does not obey.
    """
    # Imports timm, which takes a second and which nothing of a run needs before.
    from ecoformer.data.samplers import (
        DrawBatches,
        EvaluationSampler,
        Order,
        RepeatedAugmentationSampler,
        ShuffledSampler,
    )

    ranks = {"rank": rank, "world_size": world_size}
    class_names = samples["val"].class_names

    def load(split: str, order: Order) -> Loader:
        is_train = split == "train"
        return Loader(
            samples[split],
            transforms[split],
            DrawBatches(order, batch_size=data.batch_size, seed=seed, drop_last=is_train, **ranks),
            num_workers=min(data.num_workers, num_cores()),
            pin_memory=data.pin_mem and pin_memory,
            max_bad_images=data.max_bad_images if is_train else 0,
            collate=collate,
        )

    order_of_val = EvaluationSampler(
        num_images=len(samples["val"]), num_drawn=data.eval_samples, **ranks
    )
    eval_loader = load("val", order_of_val)
    if "train" not in samples:
        return Loaders(None, eval_loader, class_names, None)
    require_equal_classes(samples["train"].class_names, class_names)
    order: Order
    if data.repeated_aug and data.epoch_samples:
        raise InputError(
            f"--epoch-samples {data.epoch_samples} has no meaning with repeated augmentation, "
            "whose epochs are as long as the data; add --no-repeated-aug, or leave it out."
        )
    if data.repeated_aug:
        order = RepeatedAugmentationSampler(samples["train"], seed=seed, **ranks)
    else:
        order = ShuffledSampler(samples["train"], seed=seed, num_drawn=data.epoch_samples, **ranks)
    train_loader = load("train", order)
    if not len(train_loader):
        raise InputError(
            f"an epoch has {len(order)} training images a rank, too few for one batch; lower "
            f"--batch-size {data.batch_size} to that or less."
        )
    return Loaders(train_loader, eval_loader, class_names, None)


def num_cores() -> int:
    """Count the cores that this process may use; those of the machine where that is not known."""
    # Not every system can tell a process's own share.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def require_equal_classes(train: Sequence[str], val: Sequence[str]) -> None:
    """Check that both splits number the same classes, given by name.

    Raises:
        InputError: one of them lacks a class.
    """
    for name, only in (("val/", set(train) - set(val)), ("train/", set(val) - set(train))):
        if only:
            few = ", ".join(sorted(only)[:3])
            raise InputError(
                f"{name} lacks {len(only)} classes of the other split ({few}); "
                "both need the same class folders."
            )


def describe_failure(error: Exception) -> str:
    """Say in one line why an image cannot be read, without the file's name."""
    if isinstance(error, UnidentifiedImageError):
        return f"none of the formats {', '.join(FORMATS)}"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def keep_label(transform: Transform) -> SampleTransform:
    """Let a transform of images leave their labels as they are."""
    return partial(_keep_label, transform)


def _keep_label(transform: Transform, image: Any, label: int) -> tuple[Picture, int]:
    return transform(image), label


def _join(collate: Collate, samples: list[_Sample]) -> tuple[Batch | None, list[BadImage]]:
    bad = [image for sample in samples for image in sample.bad]
    contents = [sample.content for sample in samples if sample.content is not None]
    return (collate(contents) if len(contents) == len(samples) else None), bad
