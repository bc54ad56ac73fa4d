"""Stand-ins for torchrun, whose rank cannot reach the others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

# Its first rank's stderr ends when the process that watches this one has ended, too.
LAUNCHER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that waits for a store
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stderr=subprocess.PIPE)
rank.wait()
{then}
said = rank.stderr.read().decode()
print(said)
"""
RANK = """
from ecoformer.engine import torchrun
torchrun._SECONDS_TO_END = {seconds}
torchrun.end_hanging_torchrun(timeout_s=600)
"""
START_A_RANK = """
new = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
time.sleep(2)
"""


def launch(
    path: Path,
    then: str = "",
    *,
    seconds: float = 0.5,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """A launcher of some name, and what it does after its rank's end but wait for the watcher."""
    path.write_text(LAUNCHER.format(then=then))
    inherited = {name: value for name, value in os.environ.items() if "TORCHELASTIC" not in name}
    return subprocess.run(
        [sys.executable, path, RANK.format(seconds=seconds)],
        env={**inherited, "TORCHELASTIC_RUN_ID": "one", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_one_that_hangs_is_ended(tmp_path: Path) -> None:
    assert launch(tmp_path / "torchrun").returncode == -9


def test_one_that_obeys_is_not_killed(tmp_path: Path) -> None:
    then = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); time.sleep(60)"
    assert launch(tmp_path / "torchrun", then).returncode == 7


def test_one_that_starts_ranks_is_left_alone(tmp_path: Path) -> None:
    found = launch(tmp_path / "torchrun", f"{START_A_RANK}\nnew.kill()", seconds=1)
    assert (found.returncode, found.stdout.strip()) == (0, "")


def test_one_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    """Or the output of both would stay open for what reads it."""
    then = "sys.exit(3)"
    assert launch(tmp_path / "torchrun", then, seconds=600).returncode == 3


def test_one_with_restarts_left_may_wait_for_the_others(tmp_path: Path) -> None:
    restarts = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "1"}
    then = "time.sleep(3); sys.exit(0)"
    assert launch(tmp_path / "torchrun", then, environment=restarts).returncode == 0


@pytest.mark.parametrize("name", ["pytest", "srun"])
def test_what_is_not_torchrun_is_never_touched(name: str, tmp_path: Path) -> None:
    """Whatever the environment says, and though it waits as one that hangs."""
    found = launch(tmp_path / name, "time.sleep(2)")
    assert (found.returncode, found.stdout.strip()) == (0, "")
