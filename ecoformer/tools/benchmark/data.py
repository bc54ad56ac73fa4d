"""Time the way of training images from files to batches, beside timm's."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ecoformer.config.schema import AugmentConfig
from ecoformer.data.datasets import ImageFolder
from ecoformer.data.loaders import Loader, keep_label, num_cores
from ecoformer.data.pixels import collate_pictures
from ecoformer.data.samplers import DrawBatches, ShuffledSampler
from ecoformer.data.transforms import build_train_transform
from ecoformer.seeding import seed_everything
from ecoformer.tools.table import Column, Row, Table

# Of what ratios are.
_BASELINE = "timm"
# ImageNet's mean file has 108 kB: 138 GB for 1.28 million.
_SIDES, _QUALITY = (375, 500), 90
_NUM_DIFFERENT = 32
_PARTS = ("decode", "transform", "collate")


@dataclass(frozen=True)
class Pipeline:
    """One loader, whole and in parts.

    Args:
        decode: reads image i of the folder.
        transform: makes a sample of what was read.
        collate: makes a batch of (sample, label).
        open_batches: starts processes that read all images, in random order, in each iteration.
    """

    name: str
    decode: Callable[[int], Any]
    transform: Callable[[Any], Any]
    collate: Callable[[list[tuple[Any, int]]], Any]
    open_batches: Callable[[], Iterable[Any]]


def measure_loaders(
    folder: Path | None,
    *,
    num_images: int,
    batch_size: int,
    side: int,
    num_rounds: int,
    environment: Mapping[str, str],
) -> Table:
    """Time loaders in turns, with the released recipe for training.

    Args:
        folder: one folder of images a class, of which ``num_images`` are drawn; None generates
            JPEGs of ImageNet's size.
        side: of what a network takes, pixels.

    Raises:
        InputError: the folder holds no images.
    """
    parts: dict[str, list[list[float]]] = {}
    wholes: dict[str, list[tuple[float, float]]] = {}
    num_workers = num_cores()
    with _gather(folder, num_images) as root:
        num_bytes = statistics.mean(file.stat().st_size for file in root.glob("*/*"))
        pipelines = _build(root, batch_size=batch_size, side=side, num_workers=num_workers)
        started = {pipeline.name: _start(pipeline) for pipeline in pipelines}
        for turn in range(num_rounds):
            for pipeline in pipelines:
                seconds = _time_parts(pipeline, num_images, batch_size, seed=turn)
                parts.setdefault(pipeline.name, []).append(seconds)
                wholes.setdefault(pipeline.name, []).append(_time_whole(*started[pipeline.name]))
    num_read = num_images // batch_size * batch_size
    rows = [
        _summarize(name, parts[name], wholes[name], wholes[_BASELINE], num_read) for name in parts
    ]
    columns = (
        Column("name", ""),
        Column("per_core", "images/s a core", spec=".0f"),
        Column("ratio", f"times {_BASELINE}", spec=".2f"),
        Column("rate", "images/s", spec=".0f"),
        *(Column(f"{part}_s", f"{part}, ms", spec=".2f", scale=1e-3) for part in _PARTS),
        Column("rest_s", "hand-over, ms", spec=".2f", scale=1e-3),
    )
    source = "generated" if folder is None else "drawn from the folder"
    notes = [
        f"{num_images} JPEGs of {num_bytes / 1e3:.0f} kB, {source}, to batches of {batch_size} at "
        f"{side} px, until a batch is where it leaves for the device; {num_workers} processes "
        f"read. Medians of {num_rounds} turns; ratios are those of turns side by side.",
        "A core's rate is by CPU time, of all processes together, so that other jobs count little; "
        "images/s is by the clock. Parts are timed in one process, an image; hand-over is what the "
        "whole takes beyond them: seeds, queues and shared memory.",
        f"{_BASELINE} normalises and erases while it reads. With its prefetcher the device "
        "does, and for ecoformer, too; that is not in the figures.",
    ]
    return Table("Loading images to train on", columns, rows, notes, environment)


def _build(root: Path, *, batch_size: int, side: int, num_workers: int) -> list[Pipeline]:
    augment, nearly = AugmentConfig(), AugmentConfig(tensor_resize=True)
    sizes = {"batch_size": batch_size, "num_workers": num_workers}
    return [
        _build_ours("ecoformer", root, augment, side=side, **sizes),
        _build_ours("ecoformer, --tensor-resize", root, nearly, side=side, **sizes),
        _build_timm(_BASELINE, root, augment, side=side, is_prefetched=False, **sizes),
        _build_timm(
            f"{_BASELINE}, with prefetcher", root, augment, side=side, is_prefetched=True, **sizes
        ),
    ]


class _Epochs:
    """Draws anew in each iteration, as timm's loader does."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self._numbers = loader, count()

    def __iter__(self) -> Iterator[Any]:
        self._loader.set_epoch(next(self._numbers))
        return iter(self._loader)


def _build_ours(
    name: str, root: Path, augment: AugmentConfig, *, side: int, batch_size: int, num_workers: int
) -> Pipeline:
    images = ImageFolder(root)
    transform = build_train_transform(augment, input_size=side)
    ranks = {"rank": 0, "world_size": 1, "seed": 0}

    def open_batches() -> Iterable[Any]:
        order = ShuffledSampler(images, **ranks)
        batches = DrawBatches(order, batch_size=batch_size, drop_last=True, **ranks)
        return _Epochs(Loader(images, keep_label(transform), batches, num_workers=num_workers))

    return Pipeline(
        name, lambda index: images.read(index)[0], transform, collate_pictures, open_batches
    )


def _build_timm(
    name: str,
    root: Path,
    augment: AugmentConfig,
    *,
    side: int,
    batch_size: int,
    num_workers: int,
    is_prefetched: bool,
) -> Pipeline:
    import torch
    from timm.data import ImageDataset, create_loader

    images = ImageDataset(str(root))

    def open_batches() -> Any:
        loader = create_loader(
            images,
            side,
            batch_size,
            is_training=True,
            re_prob=augment.reprob,
            re_mode=augment.remode,
            re_count=augment.recount,
            scale=augment.scale,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.aa,
            interpolation=augment.train_interpolation,
            num_workers=num_workers,
            use_prefetcher=is_prefetched,
            device=torch.device("cpu"),
        )
        # What the prefetcher takes batches from; behind that is the device's work.
        return loader.loader if is_prefetched else loader

    collate = open_batches().collate_fn
    transform = images.transform
    assert transform is not None
    # The data set transforms what it reads: its reader alone gives files.
    return Pipeline(
        name,
        lambda index: Image.open(images.reader[index][0]).convert("RGB"),
        transform,
        collate,
        open_batches,
    )


def _time_parts(pipeline: Pipeline, num_images: int, batch_size: int, *, seed: int) -> list[float]:
    """CPU seconds of each of ``_PARTS`` an image, in this process."""
    totals = [0.0] * len(_PARTS)

    def timed(part: int, call: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = call()
        totals[part] += time.process_time() - began
        return result

    starts = range(0, num_images - batch_size + 1, batch_size)
    for start in starts:
        samples = []
        for index in range(start, start + batch_size):
            image = timed(0, partial(pipeline.decode, index))
            # All pipelines draw the same.
            seed_everything(seed * num_images + index)
            samples.append((timed(1, partial(pipeline.transform, image)), 0))
        timed(2, partial(pipeline.collate, samples))
    return [total / (len(starts) * batch_size) for total in totals]


def _time_whole(batches: Iterable[Any], workers: Collection[BaseProcess]) -> tuple[float, float]:
    """CPU seconds, of this process and its workers, and seconds by the clock, of all images."""
    cpu, clock = _cpu_seconds(workers), time.perf_counter()
    for _ in batches:
        pass
    return _cpu_seconds(workers) - cpu, time.perf_counter() - clock


def _start(pipeline: Pipeline) -> tuple[Iterable[Any], Collection[BaseProcess]]:
    """Start processes and let them read all images once; they read on in later iterations."""
    others = active_children()
    batches = pipeline.open_batches()
    for _ in batches:
        pass
    return batches, [worker for worker in active_children() if worker not in others]


def _cpu_seconds(workers: Collection[BaseProcess]) -> float:
    # Linux numbers the clock of another process by its own number.
    numbers = [~worker.pid << 3 | 2 for worker in workers if worker.pid is not None]
    return time.process_time() + sum(map(time.clock_gettime, numbers))


def _summarize(
    name: str,
    parts: Sequence[Sequence[float]],
    wholes: Sequence[tuple[float, float]],
    baseline: Sequence[tuple[float, float]],
    num_images: int,
) -> Row:
    medians = [statistics.median(seconds) for seconds in zip(*parts, strict=True)]
    cpu = statistics.median(cpu for cpu, _ in wholes) / num_images
    return {
        "name": name,
        "per_core": 1 / cpu,
        "ratio": statistics.median(
            theirs[0] / ours[0] for ours, theirs in zip(wholes, baseline, strict=True)
        ),
        "rate": num_images / statistics.median(clock for _, clock in wholes),
        **{f"{part}_s": median for part, median in zip(_PARTS, medians, strict=True)},
        "rest_s": cpu - sum(medians),
    }


@contextmanager
def _gather(folder: Path | None, num_images: int) -> Iterator[Path]:
    """Lay images out in a folder of their own, which lasts for a block."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if folder is None:
            _write_jpegs(root / "generated", num_images)
        else:
            images = ImageFolder(folder)
            chosen = random.Random(0).sample(range(len(images)), min(num_images, len(images)))
            for place in range(num_images):
                file = images.path(chosen[place % len(chosen)])
                link = root / "drawn" / f"{place:05}{file.suffix}"
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(file.resolve())
        yield root


def _write_jpegs(folder: Path, num_images: int) -> None:
    """Write noise with the spectrum of photographs; after the first few, they come again."""
    folder.mkdir()
    draw = np.random.RandomState(0)
    for place in range(num_images):
        file = folder / f"{place:05}.jpg"
        if place < _NUM_DIFFERENT:
            _draw_photograph(draw).save(file, quality=_QUALITY)
        else:
            os.link(folder / f"{place % _NUM_DIFFERENT:05}.jpg", file)


def _draw_photograph(draw: np.random.RandomState) -> Image.Image:
    """Draw noise, RGB: its amplitude falls as the frequency rises, and channels go together."""
    height, width = _SIDES
    grey = draw.standard_normal((height, width, 1)) + 0.3 * draw.standard_normal((height, width, 3))
    spectrum = np.fft.rfft2(grey, axes=(0, 1))
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    spectrum /= np.maximum(np.hypot(y, x), 1 / width)[..., None]
    pixels = np.fft.irfft2(spectrum, _SIDES, axes=(0, 1))
    scaled = 128 + 48 * pixels / pixels.std()
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
