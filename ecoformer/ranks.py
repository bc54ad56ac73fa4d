"""The ranks of a run: who this one is, what they agree on, and what they share.

Without torchrun there is no process group, and every helper gives the answer of a single rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from ecoformer.errors import InputError

T = TypeVar("T")

# How long it waits for a download, which no collective is to limit.
_DOWNLOAD_TIMEOUT = timedelta(days=1)
# Counts this process's downloads, alike on all ranks: a name in the store serves once.
_downloads = itertools.count()


class AgreedError(InputError):
    """An InputError that every rank raises at one place."""


def rank() -> int:
    """Which of all processes of the run this is; 0 for a process alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints and saves: that is rank 0."""
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add a tensor up over all ranks, in place; its shape is the same on each."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Take the largest of each entry over all ranks, in place; its shape is the same on each."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_object(value: T) -> T:
    """Give all ranks a copy of what rank 0 has; anything that pickles."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Give all ranks the values of all, by rank; anything that pickles."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def run_on_all(action: Callable[[], T]) -> list[T]:
    """Do something on every rank and give all the results, by rank.

    An InputError of one, every rank raises; ranks must not meet in the action.
    """
    result: T | InputError
    try:
        result = action()
    except InputError as error:
        result = error
    results = gather_objects(result)
    for each in results:
        if isinstance(each, InputError):
            raise AgreedError(str(each)) from each
    return cast(list[T], results)


def run_on_main(action: Callable[[], object]) -> None:
    """Do something on rank 0 while the others wait; what it raises, every rank raises."""
    error: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as raised:
            error = raised
    error = broadcast_object(error)
    if isinstance(error, InputError):
        raise AgreedError(str(error)) from error
    if error is not None:
        raise error


def download_on_main(action: Callable[[], object]) -> None:
    """As ``run_on_main``, for what may take hours."""
    key = f"ecoformer/download{next(_downloads)}"

    def download() -> None:
        try:
            action()
        finally:
            if dist.is_initialized():
                default_store().set(key, "done")

    if not is_main():
        default_store().wait([key], _DOWNLOAD_TIMEOUT)
    run_on_main(download)


def default_store() -> dist.Store:
    """Get the keys and values that the ranks of the group share, besides collectives."""
    return dist.distributed_c10d._get_default_store()
