"""Run a function on several gloo ranks, forked from one process that has all imports behind it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

# Importing torch and timm takes seconds; a process forked after that starts in milliseconds.
_PRELOAD = ["ecoformer.data.samplers", "ecoformer.engine.run", "pvt", "timm.optim"]
_TIMEOUT_S = 120.0


def warm_context() -> ForkServerContext:
    """Starts processes that are forked from the one that has the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def torchrun_environments(world_size: int) -> list[dict[str, str]]:
    """What torchrun tells each rank, by rank.

    Args:
        world_size: number of processes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(world_size)
    ]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` in processes that see torchrun's environment.

    Args:
        function: of a module's top level; enters ``process_group`` itself.
        world_size: number of processes.
        args: anything that pickles.

    Returns:
        What each rank returned, by rank.
    """
    context = warm_context()
    receivers, processes = [], []
    for environment in torchrun_environments(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_enter, args=(environment, sender, function, args))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    try:
        results = [_receive(receiver) for receiver in receivers]
        for process in processes:
            process.join(_TIMEOUT_S)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def _enter(
    environment: dict[str, str], sender: Connection, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(environment)
    try:
        outcome = True, function(*args)
    except BaseException:
        outcome = False, traceback.format_exc()
    # Plain pickle: tensors travel by value, not through memory that ends with this process.
    sender.send_bytes(pickle.dumps(outcome))


def _receive(receiver: Connection) -> Any:
    assert receiver.poll(_TIMEOUT_S), "a rank did not answer"
    is_done, result = pickle.loads(receiver.recv_bytes())
    assert is_done, result
    return result
