"""Orders of images: exact, equal for all ranks together, and able to go on in the middle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ecoformer.data.samplers import (
    Draw,
    DrawBatches,
    EvaluationSampler,
    RepeatedAugmentationSampler,
    ShuffledSampler,
)


def make_batches(
    num_images: int = 50,
    *,
    batch_size: int = 4,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = True,
    sampler: type[RepeatedAugmentationSampler] | type[ShuffledSampler] = ShuffledSampler,
) -> DrawBatches:
    order = sampler(range(num_images), seed=seed, rank=rank, world_size=world_size)
    return DrawBatches(
        order,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
    )


def draws(batches: DrawBatches) -> list[Draw]:
    return [draw for batch in batches for draw in batch]


def test_repeated_augmentation_draws_released_indices(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "repeated_aug_sampler.json").read_text())
    assert len(cases) == 3
    for case, expected in cases.items():
        num_images, world_size, rank, epoch = map(int, re.findall(r"\d+", case))
        sampler = RepeatedAugmentationSampler(
            range(num_images), seed=0, rank=rank, world_size=world_size
        )
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(sampler) == len(indices) == expected["n"]
        assert indices[:24] == expected["first"]


@pytest.mark.parametrize("sampler", [RepeatedAugmentationSampler, ShuffledSampler])
def test_seed_and_epoch_change_the_order(
    sampler: type[RepeatedAugmentationSampler] | type[ShuffledSampler],
) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        chosen = sampler(range(300), seed=seed, rank=0, world_size=1)
        chosen.set_epoch(epoch)
        return tuple(chosen)

    assert order(0, 1) == order(0, 1)
    assert len({order(0, 0), order(0, 1), order(7, 0), order(7, 1)}) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_image_once(world_size: int) -> None:
    for num_images in (0, 1, 2, 7, 50, 101):
        shares = [
            EvaluationSampler(num_images=num_images, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert [len(share) for share in shares] == [len(list(share)) for share in shares]
        assert sorted(index for share in shares for index in share) == list(range(num_images))


def test_a_part_to_evaluate_on_is_the_same_on_any_number_of_ranks() -> None:
    def read(world_size: int, num_drawn: int) -> list[int]:
        shares = [
            EvaluationSampler(num_images=101, rank=rank, world_size=world_size, num_drawn=num_drawn)
            for rank in range(world_size)
        ]
        return sorted(index for share in shares for index in share)

    part = read(1, 20)
    assert len(set(part)) == 20 and part != list(range(20))
    assert read(2, 20) == read(3, 20) == part
    assert read(2, 500) == list(range(101))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_train_on_equally_many_batches(world_size: int) -> None:
    for num_images in (5, 23, 301):
        counts = {
            len(list(make_batches(num_images, batch_size=1, rank=rank, world_size=world_size)))
            for rank in range(world_size)
        }
        assert counts == {-(-num_images // world_size)}


@pytest.mark.parametrize("sampler", [RepeatedAugmentationSampler, ShuffledSampler])
def test_ranks_interleave_to_the_draws_of_one_process(
    sampler: type[RepeatedAugmentationSampler] | type[ShuffledSampler],
) -> None:
    alone = draws(make_batches(768, sampler=sampler))
    for world_size in (2, 3):
        shares = [
            draws(make_batches(768, sampler=sampler, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        together = [draw for round_ in zip(*shares, strict=True) for draw in round_]
        assert together == alone


def test_repeated_images_have_different_seeds() -> None:
    drawn = draws(make_batches(256, sampler=RepeatedAugmentationSampler))
    assert len({draw.image for draw in drawn}) < len(drawn) / 2
    assert len({draw.seed for draw in drawn}) == len(drawn)


def test_epochs_and_runs_seed_a_place_differently() -> None:
    seeds = set()
    for seed in (0, 1):
        batches = make_batches(seed=seed)
        for epoch in (0, 1):
            batches.set_epoch(epoch)
            seeds |= {draw.seed for draw in draws(batches)}
    assert len(seeds) == 4 * 48


@pytest.mark.parametrize("start_step", [0, 1, 11, 12])
def test_epoch_goes_on_at_a_step(start_step: int) -> None:
    batches = make_batches(rank=1, world_size=1 + 1, batch_size=2)
    batches.set_epoch(3)
    whole = list(batches)
    batches.set_epoch(3, start_step)
    assert list(batches) == whole[start_step:]
    assert len(batches) == len(whole) == 12


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [4, 4]), (False, [4, 4, 3])])
def test_last_batch(drop_last: bool, sizes: list[int]) -> None:
    batches = make_batches(11, drop_last=drop_last)
    assert [len(batch) for batch in batches] == sizes
    assert len(batches) == len(sizes)
