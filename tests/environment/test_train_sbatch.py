"""The SLURM template, run against stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "environment" / "train.sbatch"
FLAGS = ["pvt.main", "--data-path", "a folder"]

# Writes its words, one a line, and ends as FATE says: at once, or when it is told to stop.
SRUN = """#!/bin/bash
trap 'echo saving; sleep 0.3; exit "$FATE"' USR1
printf '%s\\n' "$@" > "$FOLDER/part" && mv "$FOLDER/part" "$FOLDER/words"
[[ $WAITS ]] || exit "$FATE"
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && printf 'node7\\nnode8\\n' || echo "$@" >> "$FOLDER/requeued"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What SLURM sets, with stand-ins on the path."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "FOLDER": str(tmp_path),
        "FATE": "0",
        "WAITS": "",
        "SLURM_JOB_ID": "31234",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
    }


def run(environment: dict[str, str], flags: list[str], *, is_time_up: bool) -> int:
    """Start the script, and signal it, and it alone, once its run has begun."""
    process = subprocess.Popen(["bash", str(SCRIPT), *flags], env=environment)
    try:
        if is_time_up:
            deadline = time.monotonic() + 20
            while not Path(environment["FOLDER"], "words").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR1)
        return process.wait(20)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("is_time_up", "fate", "is_requeued"),
    [
        (True, "1", True),
        # It came to its end while it was told to stop.
        (True, "0", False),
        (False, "1", False),
        (False, "0", False),
    ],
)
def test_only_a_run_that_was_stopped_is_queued_again(
    environment: dict[str, str], is_time_up: bool, fate: str, is_requeued: bool
) -> None:
    environment |= {"FATE": fate, "WAITS": "yes" if is_time_up else ""}
    assert run(environment, FLAGS, is_time_up=is_time_up) == int(fate)
    requeued = Path(environment["FOLDER"], "requeued")
    assert requeued.exists() == is_requeued
    if is_requeued:
        assert requeued.read_text() == "requeue 31234\n"


def test_nodes_meet_at_the_first_one(environment: dict[str, str]) -> None:
    assert run(environment, FLAGS, is_time_up=False) == 0
    words = Path(environment["FOLDER"], "words").read_text().splitlines()
    torchrun = words.index("torchrun")
    assert "--cpus-per-task=64" in words[:torchrun]
    assert {
        "--nnodes=2",
        "--rdzv-endpoint=node7:21234",
        "--rdzv-id=31234.0",
        "--max-restarts=0",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    } < set(words[torchrun:])
    assert words[-4:] == ["-m", *FLAGS]


def test_torchrun_knows_the_flags(environment: dict[str, str]) -> None:
    from torch.distributed.run import get_args_parser

    run(environment, FLAGS, is_time_up=False)
    words = Path(environment["FOLDER"], "words").read_text().splitlines()
    args = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert args.module
    assert [args.training_script, *args.training_script_args] == FLAGS
    assert args.signals_to_handle.endswith(",SIGUSR1")


def test_nothing_to_run(environment: dict[str, str]) -> None:
    assert run(environment, [], is_time_up=False) == 2
    assert not Path(environment["FOLDER"], "words").exists()


def test_script_is_sound() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)
