"""R3: a signal wherever the run is; it saves the last finished step, and the next start goes on."""

from __future__ import annotations

import functools
import signal
import time
from pathlib import Path

import pytest

from ecoformer.checkpoint import read_checkpoint
from tests.reliability.runs import LAST, Run, Strike, assert_same_run, run, start

WORKERS = ["--num-workers", "2"]
# The phase, its number, the epoch and step of the checkpoint, flags.
MOMENTS = [
    ("step", 4, (1, 2), []),
    ("fit", 3, (2, 0), []),
    ("evaluation", 4, (1, 3), []),
    ("write", 3, None, []),
    ("data", 55, (1, 1), []),
    ("data", 5, (0, 0), WORKERS),
]


@pytest.mark.parametrize(("phase", "number", "place", "workers"), MOMENTS)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1], ids=lambda sent: sent.name)
def test_stops_saves_and_goes_on(
    phase: str,
    number: int,
    place: tuple[int, int] | None,
    workers: list[str],
    sent: signal.Signals,
    flags: list[str],
    whole: Run,
    tmp_path: Path,
) -> None:
    is_hanging = phase in ("fit", "evaluation", "data")
    strike = Strike(phase, number, sent, is_hanging=is_hanging)
    stopped = start([*flags, *workers], tmp_path, hook=strike)
    assert stopped.wait() == [75], stopped.said()
    said = stopped.said()
    struck = float(said[said.index("struck at") :].split()[2])
    assert time.time() - struck < 10
    assert stopped.orphans() == []
    assert "the same command goes on" in said.splitlines()[-1]
    if place is not None:
        found = read_checkpoint(tmp_path / LAST)
        assert (found["epoch"] + 1, found["step"]) == place
    assert_same_run(run(flags, tmp_path), whole)


@pytest.mark.parametrize("sent", [signal.SIGHUP, signal.SIGQUIT], ids=lambda sent: sent.name)
def test_a_closed_terminal_saves(
    sent: signal.Signals, flags: list[str], whole: Run, tmp_path: Path
) -> None:
    stopped = start([*flags, *WORKERS], tmp_path, hook=Strike("step", 4, sent))
    assert stopped.wait() == [75], stopped.said()
    assert stopped.orphans() == []
    assert_same_run(run(flags, tmp_path), whole)


def ignore_and_strike(rank: int, *, strike: Strike) -> None:
    signal.signal(strike.sent, signal.SIG_IGN)
    strike(rank)


def test_nohup_goes_on(flags: list[str], whole: Run, tmp_path: Path) -> None:
    strike = Strike("step", 4, signal.SIGHUP)
    assert_same_run(
        run(flags, tmp_path, hook=functools.partial(ignore_and_strike, strike=strike)), whole
    )


@pytest.mark.parametrize("phase", ["step", "fit", "evaluation"])
def test_all_ranks_stop_where_one_is_told_to(
    phase: str, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    # Rank 0 alone fits.
    strike = Strike(phase, 3, signal.SIGTERM, rank=0 if phase == "fit" else 1)
    stopped = start(pair_flags, tmp_path, world_size=2, hook=strike)
    assert stopped.wait(30) == [75, 75], stopped.said()
    assert stopped.said().count("error: ") == 1
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)
