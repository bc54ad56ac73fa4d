"""The ranks of a run: who this one is, what they agree on, and what they share.

Without torchrun there is no process group, and every helper gives the answer of a single rank.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ecoformer.errors import InputError
from ecoformer.threads import call_within

T = TypeVar("T")

# Beyond the group's own limit, which a store does not obey where its host is silent.
_GRACE_S = 5.0
# In one limit of a group.
_SIGNS_OF_LIFE = 4
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


def max_over_ranks(number: int) -> int:
    """Take the largest of the ranks' numbers; their processors meet, not their devices."""
    if not dist.is_initialized():
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Give all ranks what rank 0 has, in place; one message for each dtype.

    Their number, shapes and dtypes are the same on each rank; all lie on one device.
    """
    if not dist.is_initialized():
        return
    # Not a set, whose order differs between processes.
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


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
    """As ``run_on_main``, for what may take hours; rank 0 shows meanwhile that it is there.

    Raises:
        DistError: nothing came from rank 0 for as long as a collective may take.
    """
    if not dist.is_initialized():
        action()
        return
    store, name = default_store(), f"ecoformer/download{next(_downloads)}"
    limit_s: float = store.timeout.total_seconds()  # type: ignore[attr-defined]  # it is there
    is_done = threading.Event()

    def show_life() -> None:
        for number in itertools.count():
            is_done.wait(limit_s / _SIGNS_OF_LIFE)
            store.set(f"{name}/{number}", "done" if is_done.is_set() else "going on")
            if is_done.is_set():
                return

    def download() -> None:
        thread = threading.Thread(target=show_life, daemon=True)
        thread.start()
        try:
            action()
        finally:
            is_done.set()
            thread.join(limit_s)

    if not is_main():
        for number in itertools.count():
            if _ask(store, f"{name}/{number}", limit_s) == b"done":
                break
    run_on_main(download)


def _ask(store: dist.Store, key: str, limit_s: float) -> bytes:
    """Wait for a value, also from a store whose host has fallen silent."""
    try:
        return call_within(limit_s + _GRACE_S, lambda: store.get(key))
    except TimeoutError as error:
        raise dist.DistError(f"rank 0 is silent: {error}") from None


def default_store() -> dist.Store:
    """Get the keys and values that the ranks of the group share, besides collectives."""
    return dist.distributed_c10d._get_default_store()
