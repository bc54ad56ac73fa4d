"""Loaders: the same batches however they are loaded, and no image lost or replaced in silence."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ecoformer.config.schema import AugmentConfig, DataConfig
from ecoformer.data import Loader, build_loaders
from ecoformer.data.loaders import Batch, Loaders
from ecoformer.data.pixels import Picture
from ecoformer.engine.session import move_to
from ecoformer.errors import InputError
from tests.data.images import BAD_IMAGES, spoil, write_images

# Images of one colour look the same after this, and different each time after that.
PLAIN = AugmentConfig(aa=None, color_jitter=0.0, reprob=0.0, mixup=0.0, cutmix=0.0)
NOISY = replace(PLAIN, reprob=1.0)


def build(
    path: Path,
    *,
    augment: AugmentConfig = NOISY,
    input_size: int = 40,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    train: bool = True,
    **fields: Any,
) -> Loaders:
    settings = {"num_workers": 0, "batch_size": 4, "repeated_aug": False, **fields}
    return build_loaders(
        DataConfig(data_path=str(path), **settings),
        augment,
        input_size=input_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        train=train,
    )


def read(loader: Loader | None, epoch: int = 0, start_step: int = 0) -> list[Batch]:
    assert loader is not None
    loader.set_epoch(epoch, start_step)
    return [move_to(batch, torch.device("cpu")) for batch in loader]


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(x, y)
        for one, other in zip(left, right, strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 23, 50)


def numbers(batches: list[Batch]) -> list[int]:
    """Number of each image, read back from its colour."""
    images = torch.cat([images for images, _ in batches]) if batches else torch.empty(0, 3, 1, 1)
    return (images[:, 0, 0, 0] * 0.229 + 0.485).mul(255 / 2).round().int().tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
@pytest.mark.parametrize(("num_workers", "on"), [(1, False), (2, True), (3, False)])
def test_workers_change_nothing(
    folder: Path, num_workers: int, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecoformer.data.loaders.num_cores", lambda: 3)
    augment = AugmentConfig(tensor_resize=on)
    alone = build(folder, augment=augment)
    helped = build(folder, augment=augment, num_workers=num_workers)
    for epoch in (0, 1):
        assert equal(read(alone.train, epoch), read(helped.train, epoch))
        assert equal(read(alone.eval), read(helped.eval))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_epoch_goes_on_where_it_stopped(folder: Path, num_workers: int) -> None:
    loader = build(folder, num_workers=num_workers).train
    whole = read(loader, epoch=2)
    assert loader is not None and len(whole) == len(loader) == 5
    # Another epoch, given up in the middle, leaves no trace.
    loader.set_epoch(1)
    next(iter(loader))
    assert equal(read(loader, epoch=2, start_step=3), whole[3:])


def test_ranks_together_read_what_one_process_reads(folder: Path) -> None:
    alone = read(build(folder, batch_size=2).train)
    images = torch.cat([images for images, _ in alone])
    for rank in (0, 1):
        share = read(build(folder, batch_size=2, rank=rank, world_size=2).train)
        ours = torch.cat([images for images, _ in share])
        # The 23rd image is read twice by two ranks, and dropped by one.
        assert torch.equal(ours[:11], images[rank::2][:11])


def test_each_draw_of_an_image_differs(folder: Path) -> None:
    batches = read(build(folder, repeated_aug=True, batch_size=1).train)
    drawn = torch.cat([images for images, _ in batches])
    assert len(drawn) == 23
    assert len(drawn.flatten(1).unique(dim=0)) == 23


def test_seed_and_epoch_change_batches(folder: Path) -> None:
    readings = [
        read(build(folder, seed=seed).train, epoch) for seed, epoch in product((0, 9), (0, 1))
    ]
    assert not any(equal(readings[0], other) for other in readings[1:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_leaves_generators_alone(folder: Path, num_workers: int) -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    loaders = build(folder, num_workers=num_workers)
    before = states()
    read(loaders.train)
    read(loaders.eval)
    assert states() == before


@pytest.mark.parametrize("batch_size", [1, 4, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [2, 7, 50, 101])
def test_evaluation_reads_each_image_once(
    tmp_path: Path, num_images: int, world_size: int, batch_size: int
) -> None:
    write_images(tmp_path, 0, num_images)
    found = []
    for rank in range(world_size):
        loaders = build(
            tmp_path, batch_size=batch_size, rank=rank, world_size=world_size, train=False
        )
        batches = read(loaders.eval)
        assert len(batches) == len(loaders.eval)
        found += numbers(batches)
    assert sorted(found) == list(range(num_images))


def test_evaluation_alone_needs_no_training_images(tmp_path: Path) -> None:
    loaders = build(write_images(tmp_path, 0, 3), train=False)
    assert loaders.train is None
    assert list(loaders.class_names) == ["a", "b"]
    with pytest.raises(InputError, match="has no folder train/"):
        build(tmp_path)


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_stops_training_or_is_skipped(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_images(tmp_path, 8, 2)
    clean = read(build(folder, augment=PLAIN).train)
    bad = folder / "train" / "b" / "003.png"
    spoil(bad, BAD_IMAGES[kind])

    with pytest.raises(InputError, match=re.escape(f"cannot read {bad} (")) as caught:
        read(build(folder).train)
    assert "\n" not in str(caught.value)

    loader = build(folder, augment=PLAIN, max_bad_images=1).train
    with caplog.at_level(logging.WARNING):
        skipped = read(loader)
        read(loader, epoch=1)
    assert loader is not None and list(loader.bad_images) == [5]
    assert [record.message.count(str(bad)) for record in caplog.records] == [1]
    # Files a/0 a/2 a/4 a/6 b/1 b/3 b/5 b/7: b/5 takes the place of b/3.
    place = numbers(clean).index(3)
    expected = [5 if number == 3 else number for number in numbers(clean)]
    assert numbers(skipped) == expected
    assert torch.equal(skipped[place // 4][1], clean[place // 4][1])


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_stops_evaluation(tmp_path: Path, kind: str) -> None:
    folder = write_images(tmp_path, 0, 6)
    bad = folder / "val" / "a" / "004.png"
    spoil(bad, BAD_IMAGES[kind])
    loaders = build(folder, train=False, max_bad_images=5)
    with pytest.raises(InputError, match=re.escape(f"cannot read {bad} (")):
        read(loaders.eval)


def test_unreadable_image_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path, 0, 2)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ecoformer.data.datasets.open_regular", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        read(build(folder, train=False).eval)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_counted_once_each_and_up_to_the_limit(
    tmp_path: Path, num_workers: int
) -> None:
    folder = write_images(tmp_path, 12, 2)
    for number in (1, 3, 5):
        spoil(folder / "train" / "b" / f"{number:03}.png", b"")
    fields: dict[str, Any] = {"num_workers": num_workers, "repeated_aug": True, "batch_size": 12}
    loader = build(folder, max_bad_images=3, **fields).train
    for epoch in range(4):
        read(loader, epoch)
    assert loader is not None and sorted(loader.bad_images) == [6, 7, 8]
    strict = build(folder, max_bad_images=2, **fields).train
    with pytest.raises(InputError, match="--max-bad-images"):
        for epoch in range(4):
            read(strict, epoch)


def test_only_bad_images_end_the_run(tmp_path: Path) -> None:
    folder = write_images(tmp_path, 4, 2)
    for file in (folder / "train").rglob("*.png"):
        spoil(file, b"")
    with pytest.raises(InputError, match="cannot read"):
        read(build(folder, max_bad_images=100).train)


def test_error_in_a_transform_is_not_blamed_on_the_image(folder: Path) -> None:
    loaders = build(folder)

    def fail(image: Image.Image, label: int) -> tuple[Picture, int]:
        raise ZeroDivisionError("a mistake of ours")

    loader = Loader(loaders.eval.images, fail, loaders.eval.batches, num_workers=0)
    with pytest.raises(ZeroDivisionError):
        list(loader)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"batch_size": 32}, "an epoch has 23 training images a rank"),
        ({"batch_size": 12, "world_size": 2, "repeated_aug": True, "rank": 1}, None),
        ({"batch_size": 3, "augment": AugmentConfig()}, "--batch-size 3 is odd"),
    ],
)
def test_batch_size_must_fit(folder: Path, fields: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        assert len(read(build(folder, **fields).train)) == 1
    else:
        with pytest.raises(InputError, match=expected):
            build(folder, **fields)


def test_repeated_augmentation_has_epochs_of_its_own_length(folder: Path) -> None:
    assert len(read(build(folder, epoch_samples=8, batch_size=4).train)) == 2
    with pytest.raises(InputError, match="--epoch-samples 8 has no meaning with repeated"):
        build(folder, epoch_samples=8, repeated_aug=True)


def test_splits_must_have_the_same_classes(tmp_path: Path) -> None:
    write_images(tmp_path, 4, 4)
    extra = tmp_path / "train" / "c" / "1.png"
    extra.parent.mkdir()
    extra.touch()
    with pytest.raises(InputError, match=r"val/ lacks 1 classes of the other split \(c\)"):
        build(tmp_path)
    (tmp_path / "train" / "c").rename(tmp_path / "val" / "c")
    with pytest.raises(InputError, match=r"train/ lacks 1 classes of the other split \(c\)"):
        build(tmp_path)


def test_digits_need_no_path() -> None:
    loaders = build_loaders(DataConfig(data_set="DIGITS", num_workers=0), NOISY, input_size=32)
    assert loaders.num_classes == 10
    images, labels = read(loaders.eval)[0]
    assert images.shape == (32, 3, 32, 32)
    assert labels.dtype == torch.int64


@pytest.mark.skipif(sys.platform != "linux", reason="needs sigwaitinfo")
def test_workers_obey_their_parent_alone(folder: Path) -> None:
    loader = build(folder, num_workers=1).train
    whole = read(loader)
    (worker,) = multiprocessing.active_children()
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)
    assert equal(read(loader), whole)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_workers_do_not_inherit_what_was_freed(folder: Path) -> None:
    plain = worker_mib(folder)
    # As a step on the CPU leaves: 250 MiB of holes, and something behind them that is still used.
    blocks = [torch.ones(2**14) for _ in range(4000)]
    last = blocks.pop()
    blocks.clear()
    assert worker_mib(folder) < plain + 50
    assert last.all()


def worker_mib(folder: Path) -> int:
    """Memory of a worker, once it has read all, that is no file's."""
    loader = build(folder, num_workers=1).eval
    read(loader)
    (worker,) = multiprocessing.active_children()
    status = Path(f"/proc/{worker.pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) // 1024


def test_a_killed_worker_is_one_line_where_a_batch_is_waited_for(folder: Path) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    loader = build(folder, num_workers=1, batch_size=2).eval
    # The second epoch, with workers of the first.
    read(loader)
    (worker,) = multiprocessing.active_children()
    batches = iter(loader)
    next(batches)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    # Nothing is raised in the middle of something else.
    for _ in range(50):
        time.sleep(0.01)
    with pytest.raises(InputError, match=r"ended by SIGKILL, .*lower --num-workers") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) is before


def test_a_worker_that_exits_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecoformer.data.datasets.open_regular", lambda path: os._exit(7))
    with pytest.raises(InputError, match="ended by exit code 7"):
        read(build(folder, num_workers=1).eval)


def test_an_error_in_a_worker_is_not_a_killed_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    loader = build(folder, num_workers=1).eval
    monkeypatch.setattr("ecoformer.data.loaders.seed_host", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        read(loader)


def test_fingerprints_tell_what_changed(tmp_path: Path) -> None:
    def take() -> dict[str, Any]:
        return build(tmp_path).fingerprint()

    folder = write_images(tmp_path, 12, 4)
    first = take()
    assert first == take()
    assert {split: {**found, "digest": ""} for split, found in first.items()} == {
        "train": {"num_classes": 2, "num_images": 12, "digest": ""},
        "val": {"num_classes": 2, "num_images": 4, "digest": ""},
    }
    # Plain values, for a checkpoint.
    assert json.loads(json.dumps(first)) == first

    (folder / "train" / "a" / "000.png").rename(folder / "train" / "b" / "000.png")
    moved = take()
    assert moved["train"]["num_images"] == 12
    assert moved["train"]["digest"] != first["train"]["digest"]
    assert moved["val"] == first["val"]
    (folder / "train" / "b" / "000.png").rename(folder / "train" / "a" / "000.png")
    assert take() == first

    (folder / "val" / "b" / "001.png").rename(folder / "val" / "b" / "renamed.png")
    assert take()["val"]["digest"] != first["val"]["digest"]
    for split in ("train", "val"):
        (folder / split / "b").rename(folder / split / "c")
    assert take()["train"]["digest"] != first["train"]["digest"]


def test_sets_in_memory_have_fingerprints() -> None:
    data = DataConfig(data_set="DIGITS", num_workers=0)
    found = [build_loaders(data, NOISY, input_size=size).fingerprint() for size in (32, 40)]
    assert found[0] == found[1]
    assert found[0]["train"]["num_images"] == 1437
    alone = build_loaders(data, NOISY, input_size=32, train=False).fingerprint()
    assert alone == {"val": found[0]["val"]}
