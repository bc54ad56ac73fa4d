"""The ranks of a run: who this one is, what they agree on, and what they share.

Without torchrun there is no process group, and every helper gives the answer of a single rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecoformer.config.released import is_main_process
from ecoformer.errors import InputError, NonFiniteError, Preempted, suggest
from ecoformer.hashing import hash_layers

T = TypeVar("T")

# How long a rank waits in a collective: longer than a fit or a save on a slow disk takes.
_TIMEOUT = timedelta(minutes=10)
# How long it waits for a download, which no collective is to limit.
_DOWNLOAD_TIMEOUT = timedelta(days=1)
_ERROR_KEY = "ecoformer/error"
_DOWNLOAD_KEY = "ecoformer/download"


def rank() -> int:
    """Ask which of all processes of the run this is.

    Returns:
        Its number; 0 for a process alone.
    """
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Count the processes of the run.

    Returns:
        At least 1.
    """
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Ask whether this process prints and saves.

    Returns:
        True on rank 0.
    """
    return rank() == 0


def choose_device(name: str | None) -> torch.device:
    """Choose what this process computes on.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or None for CUDA where there is one. Of the
            processes that torchrun starts on a machine, each takes its own CUDA device.

    Returns:
        The CPU, or a CUDA device with its number.

    Raises:
        InputError: there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"--device {name!r} is no device{suggest(name, ['cpu', 'cuda'])}"
            " Use cpu, cuda or cuda:N."
        ) from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(f"--device {name!r} is not supported; use cpu, cuda or cuda:N.")
    index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
    num_devices = torch.cuda.device_count()
    if index >= num_devices:
        raise InputError(
            f"CUDA device {index} was asked for, and there are {num_devices}; start no more "
            "processes than devices (--nproc_per_node), or use --device cpu."
        )
    return torch.device("cuda", index)


@contextmanager
def process_group(device_name: str | None = None) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for the time of a block.

    Args:
        device_name: see ``choose_device``.

    Yields:
        This process's device.

    Raises:
        InputError: there is no such device.
    """
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield device
        return
    store, number, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    # After a restart torchrun lets the ranks meet in the same store, where the addresses of those
    # that died still are. On several nodes counts may differ, and torchrun needs
    # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for a new store each time.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(
        store=store,
        rank=number,
        world_size=size,
        # gloo also beside NCCL: what processors agree on need not wait for devices.
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield device
    # All ranks raise these at one place. After another error the others may be inside a
    # collective, and leaving the group together with them would hang.
    except (NonFiniteError, Preempted):
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def claim_error() -> bool:
    """Ask whether this rank is to print its error.

    Returns:
        True on the first rank that fails, and on no other unless the ranks have lost each other.
    """
    if not dist.is_initialized():
        return is_main_process()
    # The store may have gone with its host; then better twice than not at all.
    with suppress(RuntimeError):
        return _store().add(_ERROR_KEY, 1) == 1
    return True


def has_failed_elsewhere() -> bool:
    """Ask whether another rank's failure explains a broken collective.

    Returns:
        True where a rank has claimed an error, or can no longer be asked.
    """
    if not dist.is_initialized():
        return False
    with suppress(RuntimeError):
        return _store().check([_ERROR_KEY])
    return True


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add a tensor up over all ranks, in place.

    Args:
        tensor: any shape, the same on all ranks.

    Returns:
        The same tensor.
    """
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Take the largest of each entry over all ranks, in place.

    Args:
        tensor: any shape, the same on all ranks.

    Returns:
        The same tensor.
    """
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_object(value: T) -> T:
    """Give all ranks what one of them has.

    Args:
        value: anything that pickles; looked at on rank 0 only.

    Returns:
        Rank 0's ``value``; on the other ranks a copy of it.
    """
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Exchange a value among all ranks.

    Args:
        value: anything that pickles.

    Returns:
        The values of all, by rank.
    """
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def run_on_main(action: Callable[[], object]) -> None:
    """Do something on rank 0 while the others wait, and fail on all ranks where it fails.

    Args:
        action: what rank 0 does.

    Raises:
        Exception: what the action raised, on every rank.
    """
    error: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as raised:
            error = raised
    error = broadcast_object(error)
    if error is not None:
        raise error


def download_on_main(action: Callable[[], object]) -> None:
    """As ``run_on_main``, for what may take hours; once in a process group.

    Args:
        action: what rank 0 does.

    Raises:
        Exception: what the action raised, on every rank.
    """

    def download() -> None:
        try:
            action()
        finally:
            if dist.is_initialized():
                _store().set(_DOWNLOAD_KEY, "done")

    if not is_main():
        _store().wait([_DOWNLOAD_KEY], _DOWNLOAD_TIMEOUT)
    run_on_main(download)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def broadcast_hash_functions(model: nn.Module) -> None:
    """Give every rank the hash functions of rank 0.

    Args:
        model: the bare model, the same on every rank.
    """
    if not dist.is_initialized():
        return
    for layer in hash_layers(model).values():
        for buffer in layer.buffers():
            dist.broadcast(buffer, src=0)
        layer.refresh_fitted()
