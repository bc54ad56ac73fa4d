"""Joining the ranks of a run, and who of them reports an error."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from ecoformer.engine.torchrun import end_hanging_torchrun, end_with_torchrun
from ecoformer.errors import (
    InputError,
    NonFiniteError,
    Preempted,
    is_main_process,
    suggest,
)
from ecoformer.ops.backends.native import library
from ecoformer.ranks import AgreedError, default_store
from ecoformer.threads import call_within

# How long it looks for a store at a port.
_PATIENCE = timedelta(seconds=5)
# Beyond the group's own limit, for what does not obey it.
_GRACE_S = 15.0
# How long the store has to say who has failed.
_SECONDS_FOR_AN_ANSWER = 3.0
_PORT_KEY = "ecoformer/port"
_ERROR_KEY = "ecoformer/error"

# Counts the groups that this process has joined: a name in the store serves once.
_numbers = itertools.count()


def choose_device(name: str | None) -> torch.device:
    """Choose ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; None is CUDA where there is one.

    Of the processes that torchrun starts on a machine, each takes its own CUDA device.

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
def process_group(
    device_name: str | None = None, timeout_minutes: float = 10.0
) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for a block; yields this process's device.

    A group that is there already is used and left as it is. Without torchrun there is none. A rank
    waits ``timeout_minutes`` for the others, and ends when its torchrun has. Where it cannot reach
    the others, its torchrun ends after it.

    Raises:
        InputError: there is no such device, or the group that is there cannot reach the CPU.
        NoMeetingError: not all ranks came in time.
    """
    device = choose_device(device_name)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if dist.is_initialized():
            if "cpu:" not in dist.get_backend_config():
                raise InputError(
                    f"the process group has the backend {dist.get_backend()!r} alone, and ranks "
                    "agree on their CPUs; start it with "
                    "init_process_group('cpu:gloo,cuda:nccl')."
                )
            if device.type == "cpu":
                library.agree()
            yield device
            return
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            yield device
            return
        end_with_torchrun()
        try:
            _join(device, timedelta(minutes=timeout_minutes))
            if device.type == "cpu":
                library.agree()
            yield device
        # All ranks raise these at one place. After another error the others may be inside a
        # collective, and leaving the group together with them would hang.
        except (NonFiniteError, Preempted, AgreedError):
            dist.destroy_process_group()
            raise
        except RuntimeError as error:
            if isinstance(error, NoMeetingError) or is_lost_rank(error):
                end_hanging_torchrun(60 * timeout_minutes)
            raise
        dist.destroy_process_group()


class NoMeetingError(RuntimeError):
    """The ranks did not find each other, so that each has to say so."""


def _join(device: torch.device, timeout: timedelta) -> None:
    def join() -> None:
        store, number, size = _meet(timeout)
        # A thread has a current device of its own.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            dist.init_process_group(
                store=dist.PrefixStore(str(next(_numbers)), store),
                rank=number,
                world_size=size,
                # gloo also beside NCCL: what processors agree on need not wait for devices.
                backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )

    try:
        # Where the link breaks meanwhile, the store's client waits without end.
        call_within(timeout.total_seconds() + _GRACE_S, join)
    except (RuntimeError, TimeoutError) as error:
        if not _is_of_collective(error):
            raise
        raise NoMeetingError(
            f"rank {os.environ['RANK']} did not meet the others at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} in time "
            f"(--dist-timeout {timeout.total_seconds() / 60:g}): check that all are started and "
            f"can reach that host. {error}"
        ) from error


@cache
def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store of all ranks, this rank's number and how many there are.

    Kept for the process's life: a rank early for the next group would find a store about to go.
    """
    store, number, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _open_store(store, number, timeout)
    return store, number, size


def _open_store(torchrun_store: dist.Store, number: int, timeout: timedelta) -> dist.Store:
    """Let rank 0 open a store for the ranks of this start alone.

    torchrun keeps its own over restarts, and with it the addresses of ranks that died, which others
    would wait for; no count in the environment is the same on all nodes after a restart.
    """
    host = os.environ["MASTER_ADDR"]
    if number == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        torchrun_store.set(_PORT_KEY, str(store.port))
        return store
    end = time.monotonic() + timeout.total_seconds()
    while True:
        port = int(torchrun_store.get(_PORT_KEY))
        try:
            store = dist.TCPStore(host, port, timeout=_PATIENCE, wait_for_workers=False)
        except dist.DistError:
            # The port of a rank 0 that has died, unless its host cannot be reached.
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            store.set_timeout(timeout)
            return store


def claim_error() -> bool:
    """Ask whether this rank is to print its error: the first that fails is.

    So are others where the ranks have lost each other.
    """
    if not dist.is_initialized():
        return is_main_process()
    # The store may have gone with its host; then better twice than not at all.
    return _ask_store(lambda store: store.add(_ERROR_KEY, 1) == 1, if_silent=True)


def is_lost_rank(error: RuntimeError) -> bool:
    """Tell whether an error is that of a collective that another rank has left, or never reached.

    gloo raises no type of its own, but names its source.
    """
    return _is_of_collective(error) and dist.is_initialized()


def _is_of_collective(error: Exception) -> bool:
    return isinstance(error, (dist.DistError, TimeoutError)) or "gloo" in str(error)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether memory did not suffice, which only CUDA has a type of its own for."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # The allocator of the CPU, and sizes beyond 63 bits, which no memory has either.
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return any(word in str(error) for word in words)


def has_failed_elsewhere() -> bool:
    """Ask whether a rank has claimed an error, or all are gone: that breaks collectives."""
    return dist.is_initialized() and _ask_store(
        lambda store: store.check([_ERROR_KEY]), if_silent=False
    )


def _ask_store(question: Callable[[dist.Store], bool], *, if_silent: bool) -> bool:
    """True where the store is gone; one whose host is silent would be waited for without end."""
    try:
        return call_within(_SECONDS_FOR_AN_ANSWER, lambda: question(default_store()))
    except TimeoutError:
        return if_silent
    except RuntimeError:
        return True
