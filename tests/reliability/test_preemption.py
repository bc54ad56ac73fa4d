"""R3: a signal wherever the run is; it saves the last finished step, and the next start goes on."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ecoformer.checkpoint import read_checkpoint
from ecoformer.engine.signals import STOP_SIGNALS
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


@dataclass(frozen=True)
class GroupStrike(Strike):
    """Two signals at once to the rank and all that it started, as a scheduler sends them."""

    second: signal.Signals = signal.SIGTERM

    def hit(self, count: int, pid: int | None = None) -> None:
        if count != self.number:
            return
        # Not from the rank itself, whose SIGTERM means its workers alone.
        sender = os.fork()
        if sender:
            os.waitpid(sender, 0)
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        os.killpg(0, self.sent)
        os.killpg(0, self.second)
        os._exit(0)


def strike_each(rank: int, *, strike: Strike) -> None:
    dataclasses.replace(strike, rank=rank)(rank)


@pytest.mark.parametrize("num_stops", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_storm_of_signals_to_whole_groups(
    num_stops: int, pair_flags: list[str], tmp_path: Path
) -> None:
    """R19: to one rank's group or to both, with accumulation, repeated augmentation, refits."""
    flags = [
        *(*pair_flags, "--batch-size", "2", "--repeated-aug", "--grad-accum-steps", "2"),
        *("--k", "1", "--epochs", str(2 + num_stops // 2)),
    ]
    whole = run(flags, tmp_path / "whole", world_size=2)
    draw = random.Random(19)
    folder = tmp_path / "storm"
    signals = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT]
    for _ in range(num_stops):
        phase = draw.choice(["step", "evaluation", "data", "write", "fit"])
        rank = 0 if phase in ("write", "fit") else draw.randrange(2)
        sent, second = draw.choices(signals, k=2)
        strike = GroupStrike(phase, draw.randrange(2), sent, rank, second=second)
        is_each = draw.random() < 0.5 and phase not in ("write", "fit")
        hook = functools.partial(strike_each, strike=strike) if is_each else strike
        stopped = start([*flags, *WORKERS], folder, world_size=2, hook=hook)
        assert stopped.wait() == [75, 75], f"{strike}\n{stopped.said()}"
        assert stopped.orphans() == []
    assert_same_run(run(flags, folder, world_size=2), whole)


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
