"""Which image each rank reads when, and the seed of what is done to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple, Protocol, cast

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler, Sampler

from ecoformer.seeding import derive_seed


class Order(Protocol):
    """Image indices of one rank in one epoch; draw k is number ``k * world_size + rank`` of all."""

    def __iter__(self) -> Iterator[int]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given."""


class EvaluationSampler(Sampler[int]):
    """Share out every image exactly once: rank r reads r, r + world_size, ...

    Ranks may differ by one image, and may have none.

    Args:
        num_drawn: how many are read at most, over all ranks, drawn once for all runs; all where
            None.
    """

    def __init__(
        self, *, num_images: int, rank: int, world_size: int, num_drawn: int | None = None
    ) -> None:
        order: Sequence[int] = range(num_images)
        if num_drawn is not None:
            generator = torch.Generator().manual_seed(0)
            order = sorted(torch.randperm(num_images, generator=generator)[:num_drawn].tolist())
        self.indices = order[rank::world_size]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        """Keep the order: it is the same in every epoch."""


class ShuffledSampler(DistributedSampler[int]):
    """Share out a new permutation each epoch; its first images fill up the last round.

    Args:
        num_drawn: how many of its images an epoch has, over all ranks; all where None.
    """

    def __init__(
        self,
        images: Sized,
        *,
        seed: int,
        rank: int,
        world_size: int,
        num_drawn: int | None = None,
    ) -> None:
        super().__init__(cast(Dataset[Any], images), world_size, rank, seed=seed)
        share = self.num_samples if num_drawn is None else -(-num_drawn // world_size)
        self.num_drawn = min(self.num_samples, share)

    def __len__(self) -> int:
        return self.num_drawn

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.num_drawn)


class RepeatedAugmentationSampler(RepeatAugSampler):
    """Share out a new permutation each epoch, each image three times in a row.

    The epoch ends after as many draws as there are images, rounded down to whole 256, so it sees a
    third of them, each in three augmentations, on different ranks where there are several. timm's
    sampler knows the epoch alone: the seed is added to it.

    Source: Hoffer et al., "Augment your batch", CVPR 2020; DeiT's form, by timm.
    """

    def __init__(self, images: Sized, *, seed: int, rank: int, world_size: int) -> None:
        super().__init__(images, num_replicas=world_size, rank=rank, num_repeats=3)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order is given."""
        super().set_epoch(self.seed + epoch)


class Draw(NamedTuple):
    """The number of an image to read, and the seed of what happens to it."""

    image: int
    seed: int


class DrawBatches(Sampler[list[Draw]]):
    """Cut a rank's order into batches, and seed each draw by its place among those of all ranks.

    A repeated image gets another seed each time, and no seed depends on what was read before.
    ``drop_last`` leaves out a last batch that is not full.
    """

    def __init__(
        self,
        order: Order,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.set_epoch(0)

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        num_full, num_left = divmod(len(self.order), self.batch_size)
        return num_full + (num_left > 0 and not self.drop_last)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch, and how many batches of it were seen by an earlier process."""
        self.epoch = epoch
        self.start_step = start_step
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        images = list(self.order)
        for step in range(self.start_step, len(self)):
            first = step * self.batch_size
            batch = images[first : first + self.batch_size]
            yield [Draw(image, self._seed_of(first + k)) for k, image in enumerate(batch)]

    def _seed_of(self, draw: int) -> int:
        position = draw * self.world_size + self.rank
        return derive_seed("sample", self.seed, self.epoch, position)
