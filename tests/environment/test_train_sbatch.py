"""The SLURM template, run against stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "environment" / "train.sbatch"
FLAGS = ["pvt.main", "--data-path", "a folder"]

# Writes its words, one a line, and ends as FATE says: at once, or when it is told to stop. A second
# signal would end it while it saves.
SRUN = """#!/bin/bash
trap 'trap - USR1; touch "$FOLDER/told"; sleep 0.5; exit "$FATE"' USR1
printf '%s\\n' "$@" > "$FOLDER/part" && mv "$FOLDER/part" "$FOLDER/words"
[[ $WAITS ]] || exit "$FATE"
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] || { echo "$@" >> "$FOLDER/requeued"; exit; }
touch "$FOLDER/asked"
sleep "$DELAY"
printf 'node7\\nnode8\\n'
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
        "DELAY": "0",
        "SLURM_JOB_ID": "31234",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
    }


def run(environment: dict[str, str], flags: list[str], *, signals_at: Sequence[str] = ()) -> int:
    """Start the script, and signal it, and it alone, as soon as each of some files is there."""
    process = subprocess.Popen(["bash", str(SCRIPT), *flags], env=environment)
    try:
        for name in signals_at:
            deadline = time.monotonic() + 20
            while not Path(environment["FOLDER"], name).exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR1)
        return process.wait(20)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("signals_at", "fate", "is_requeued"),
    [
        (["words"], "1", True),
        (["words", "told"], "1", True),
        # It came to its end while it was told to stop.
        (["words"], "0", False),
        ([], "1", False),
        ([], "0", False),
    ],
)
def test_only_a_run_that_was_stopped_is_queued_again(
    environment: dict[str, str], signals_at: list[str], fate: str, is_requeued: bool
) -> None:
    environment |= {"FATE": fate, "WAITS": "yes" if signals_at else ""}
    assert run(environment, FLAGS, signals_at=signals_at) == int(fate)
    requeued = Path(environment["FOLDER"], "requeued")
    assert requeued.exists() == is_requeued
    if is_requeued:
        assert requeued.read_text() == "requeue 31234\n"


def test_a_run_whose_time_is_up_before_it_begins_is_queued_again(
    environment: dict[str, str],
) -> None:
    environment["DELAY"] = "0.3"
    assert run(environment, FLAGS, signals_at=["asked"]) == 75
    assert not Path(environment["FOLDER"], "words").exists()
    assert Path(environment["FOLDER"], "requeued").read_text() == "requeue 31234\n"


def test_nodes_meet_at_the_first_one(environment: dict[str, str]) -> None:
    assert run(environment, FLAGS) == 0
    words = Path(environment["FOLDER"], "words").read_text().splitlines()
    torchrun = words.index("torchrun")
    assert words[:torchrun] == ["--cpus-per-task=64", "--wait=180"]
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

    run(environment, FLAGS)
    words = Path(environment["FOLDER"], "words").read_text().splitlines()
    args = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert args.module
    assert [args.training_script, *args.training_script_args] == FLAGS
    assert args.signals_to_handle.endswith(",SIGUSR1")


def test_gpus_may_bring_their_cores(environment: dict[str, str]) -> None:
    del environment["SLURM_CPUS_PER_TASK"]
    assert run(environment, FLAGS) == 0
    words = Path(environment["FOLDER"], "words").read_text().splitlines()
    assert words[: words.index("torchrun")] == ["--wait=180"]


def test_nothing_to_run(environment: dict[str, str]) -> None:
    assert run(environment, []) == 2
    assert not Path(environment["FOLDER"], "words").exists()


def test_script_is_sound() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)
