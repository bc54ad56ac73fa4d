"""Runs under torchrun, in processes of their own, one torchrun a node."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.engine.ranks import torchrun_environments, warm_context
from tests.reliability.runs import TINY, Run, Strike, lead_session


def wait_for_strike(found: Run) -> None:
    end = time.monotonic() + 90
    while "struck at" not in found.said():
        assert time.monotonic() < end, found.said()
        time.sleep(0.1)


def launch(flags: list[str], said: Path, strike: Strike, **options: Any) -> None:
    """torchrun on two ranks, here or on two nodes, of which the first attempt loses one."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    lead_session(said)
    settings: dict[str, Any] = {
        **{"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "monitor_interval": 0.1},
        **{"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"},
        # This process has its imports behind it; a forkserver of its own would repeat them.
        "start_method": "fork",
    }
    config = LaunchConfig(**settings | options)
    elastic_launch(config, work)(flags, said, strike)


def work(flags: list[str], said: Path, strike: Strike) -> None:
    """A rank under torchrun."""
    from ecoformer.engine.command import run_command

    lead_session(said)
    with said.with_name("sessions").open("a") as file:
        print(os.getpid(), file=file)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        strike(int(os.environ["RANK"]))
    code = run_command(flags, TINY)
    if code:
        raise SystemExit(code)


def become_torchrun(words: list[str], flags: list[str], said: Path, strike: Strike) -> None:
    """Turn this process into the command ``torchrun``, as a shell starts it."""
    lead_session(said)
    moment = [strike.phase, str(strike.number), strike.sent.name, str(strike.rank)]
    work = ["-m", __name__, str(said), *moment, *flags]
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words, *work])


def start_nodes(
    flags: list[str], folder: Path, strike: Strike, *, num_local: int = 1, backend: str = "c10d"
) -> Run:
    """Two torchruns, as if each were on a node of its own."""
    [environment, _] = torchrun_environments(2)
    options = {
        **{"min_nodes": 2, "max_nodes": 2, "nproc_per_node": num_local, "max_restarts": 2},
        **{"rdzv_backend": backend, "rdzv_endpoint": f"127.0.0.1:{environment['MASTER_PORT']}"},
        "run_id": "pair",
    }
    flags = [*flags, "--output_dir", str(folder)]
    nodes = []
    for node in range(2):
        node_options = options | {"rdzv_configs": {"rank": node} if backend == "static" else {}}
        arguments = (flags, folder / f"said.{node}", strike)
        nodes.append(warm_context().Process(target=launch, args=arguments, kwargs=node_options))
        nodes[-1].start()
    return Run(folder, nodes)


def list_sessions(folder: Path) -> list[int]:
    """Those of the ranks that torchruns have started."""
    return [int(line) for line in (folder / "sessions").read_text().split()]


if __name__ == "__main__":
    _said, _phase, _number, _sent, _rank, *_flags = sys.argv[1:]
    _strike = Strike(_phase, int(_number), signal.Signals[_sent], rank=int(_rank))
    work(_flags, Path(_said), _strike)
