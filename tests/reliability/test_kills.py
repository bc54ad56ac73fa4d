"""R1, R2, R14: kill -9 at any moment, then the same command again."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ecoformer.checkpoint import read_checkpoint
from tests.engine.ranks import warm_context
from tests.reliability.runs import (
    Run,
    Strike,
    assert_same_run,
    draw_strikes,
    find_orphans,
    run,
    start,
)
from tests.reliability.torchruns import launch, list_sessions, start_nodes, wait_for_strike

STRIKES = draw_strikes(20, seed=6, sent=signal.SIGKILL)
PAIR_STRIKES = [
    Strike("step", 4, signal.SIGKILL, rank=1),
    Strike("write", 3, signal.SIGKILL),
    Strike("fit", 2, signal.SIGKILL),
    Strike("evaluation", 3, signal.SIGKILL, rank=1),
    Strike("step", 7, signal.SIGKILL, rank=0),
]


def few_fast(strikes: Sequence[Strike], num_fast: int) -> list[object]:
    """All of them, of which only the first belong to ``make test``."""
    slow = [pytest.param(strike, marks=pytest.mark.slow) for strike in strikes[num_fast:]]
    return [*strikes[:num_fast], *slow]


def name(strike: Strike) -> str:
    return f"{strike.phase}-{strike.number}-rank{strike.rank}"


@pytest.mark.parametrize("strike", few_fast(STRIKES, 6), ids=name)
def test_killed_run_ends_as_if_nothing_had_happened(
    strike: Strike, flags: list[str], whole: Run, tmp_path: Path
) -> None:
    killed = start(flags, tmp_path, hook=strike)
    assert killed.wait() == [-9], killed.said()
    for path in tmp_path.glob("*.pth"):
        read_checkpoint(path)
    assert_same_run(run(flags, tmp_path), whole)


def test_killed_again_and_again(flags: list[str], whole: Run, tmp_path: Path) -> None:
    for number in range(3):
        killed = start(flags, tmp_path, hook=Strike("step", number, signal.SIGKILL))
        assert killed.wait() == [-9], killed.said()
    assert_same_run(run(flags, tmp_path), whole)


@pytest.mark.parametrize("strike", few_fast(PAIR_STRIKES, 2), ids=name)
def test_killed_rank_takes_the_other_along(
    strike: Strike, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    flags = [*pair_flags, "--num-workers", "1"]
    killed = start(flags, tmp_path, world_size=2, hook=strike)
    began = time.monotonic()
    killed.processes[strike.rank].join(60)
    codes = killed.wait(30)
    assert codes.pop(strike.rank) == -9
    assert codes not in ([None], [0], [-9]), killed.said()
    assert time.monotonic() - began < 60
    assert killed.orphans() == []
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)


@pytest.mark.parametrize("silent", [1, 0])
def test_nobody_waits_for_ever_for_a_rank_that_hangs(
    silent: int, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    """Rank 0 keeps the store, too, which the other one asks for who has failed."""
    flags = [*pair_flags, "--dist-timeout", "0.07"]
    strike = Strike("step", 4, signal.SIGSTOP, rank=silent)
    hanging = start(flags, tmp_path, world_size=2, hook=strike)
    other = hanging.processes[1 - silent]
    other.join(64)
    assert other.exitcode == 1, hanging.said()
    said = (tmp_path / f"said.{1 - silent}").read_text()
    assert said.count("error: ") == 1
    assert "--dist-timeout 0.07" in said
    assert "Traceback" not in said
    assert hanging.wait(0)[silent] is None
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)


def test_ranks_end_with_their_torchrun(
    pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    """It gets no time to tell them; the same command at once finds the folder free."""
    strike = Strike("step", 4, signal.SIGSTOP, rank=1)
    flags = [*pair_flags, "--num-workers", "1", "--output_dir", str(tmp_path)]
    torchrun = warm_context().Process(target=launch, args=(flags, tmp_path / "said.0", strike))
    torchrun.start()
    wait_for_strike(Run(tmp_path, []))
    torchrun.kill()
    sessions = list_sessions(tmp_path)
    # The one that was stopped cannot look; it goes when it is woken.
    os.kill(sessions[0], signal.SIGCONT)
    os.kill(sessions[1], signal.SIGCONT)
    assert find_orphans(sessions) == []
    (tmp_path / "sessions").unlink()
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_torchrun_restarts_or_fails(
    max_restarts: int, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    strike = Strike("step", 4, signal.SIGKILL, rank=1)
    flags = [*pair_flags, "--output_dir", str(tmp_path)]
    torchrun = warm_context().Process(
        target=launch,
        args=(flags, tmp_path / "said.0", strike),
        kwargs={"max_restarts": max_restarts},
    )
    torchrun.start()
    found = Run(tmp_path, [torchrun])
    [code] = found.wait(90)
    sessions = list_sessions(tmp_path)
    assert len(sessions) == 2 + 2 * max_restarts
    assert find_orphans(sessions) == []
    if not max_restarts:
        assert code not in (0, None), found.said()
        return
    assert code == 0, found.said()
    assert_same_run(found, whole_pair)


@pytest.mark.parametrize("num_signals", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_to_torchrun_saves(
    num_signals: int, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    strike = Strike("step", 4, signal.SIGSTOP, rank=1)
    flags = [*pair_flags, "--num-workers", "1", "--output_dir", str(tmp_path)]
    torchrun = warm_context().Process(target=launch, args=(flags, tmp_path / "said.0", strike))
    torchrun.start()
    found = Run(tmp_path, [torchrun])
    wait_for_strike(found)
    for _ in range(num_signals):
        assert torchrun.pid is not None
        os.kill(torchrun.pid, signal.SIGTERM)
        time.sleep(0.5)
    for session in list_sessions(tmp_path):
        os.kill(session, signal.SIGCONT)
    assert found.wait() not in ([0], [None])
    assert find_orphans(list_sessions(tmp_path)) == []
    # At a second one torchrun kills its ranks, which may not have finished.
    assert num_signals == 2 or found.said().count("the same command goes on") == 1
    (tmp_path / "sessions").unlink()
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("backend", ["c10d", pytest.param("static", marks=pytest.mark.slow)])
def test_a_torchrun_on_each_of_two_nodes_restarts(
    backend: str, killed: int, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    strike = Strike("step", 4, signal.SIGKILL, rank=killed)
    found = start_nodes(pair_flags, tmp_path, strike, backend=backend)
    assert found.wait(90) == [0, 0], found.said()
    assert len(list_sessions(tmp_path)) == 4
    assert find_orphans(list_sessions(tmp_path)) == []
    assert_same_run(found, whole_pair)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_two_ranks_on_each_of_two_nodes_go_on(
    sent: signal.Signals, flags: list[str], tmp_path: Path
) -> None:
    flags = [*flags, "--batch-size", "2", "--amp-dtype", "none"]
    whole = run(flags, tmp_path / "whole", world_size=4)
    (tmp_path / "nodes").mkdir()
    found = start_nodes(flags, tmp_path / "nodes", Strike("step", 4, sent, rank=3), num_local=2)
    assert found.wait(120) == [0, 0], found.said()
    assert len(list_sessions(found.folder)) == 8
    assert find_orphans(list_sessions(found.folder)) == []
    assert_same_run(found, whole)


@pytest.mark.parametrize("num_kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_storm_of_kills(num_kills: int, pair_flags: list[str], tmp_path: Path) -> None:
    """R19: accumulated gradients, repeated augmentation, a refit in each epoch."""
    flags = [
        *(*pair_flags, "--batch-size", "2", "--repeated-aug", "--grad-accum-steps", "2"),
        *("--k", "1", "--epochs", str(2 + num_kills // 2)),
    ]
    whole = run(flags, tmp_path / "whole", world_size=2)
    draw = random.Random(19)
    folder = tmp_path / "storm"
    num_killed = 0
    for _ in range(num_kills):
        phase = draw.choice(["step", "step", "evaluation", "write", "flush", "rename", "fit"])
        rank = 0 if phase in ("write", "flush", "rename", "fit") else draw.randrange(2)
        strike = Strike(phase, draw.randrange(3), signal.SIGKILL, rank=rank)
        codes = start(flags, folder, world_size=2, hook=strike).wait()
        assert None not in codes
        num_killed += -9 in codes
    print(f"{num_killed} killed")
    assert num_killed == num_kills
    assert_same_run(run(flags, folder, world_size=2), whole)


def watch(rank: int, *, file: Path) -> None:
    """Write down memory and open files of a process at the end of each epoch, and its zombies."""
    from ecoformer.engine.logs import RunLog

    real, folder = RunLog.write, os.path.realpath(file.parent)

    def write(self: RunLog, record: dict[str, float], **options: bool) -> None:
        real(self, record, **options)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        names = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        # Not those of a checkpoint that is just being written, nor its folder, flushed after it.
        num_files = sum(not name.endswith(".tmp") and name != folder for name in names)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][1] for pid in children]
        numbers = (os.getpid(), pages * os.sysconf("SC_PAGE_SIZE"), num_files, states.count("Z"))
        with file.open("a") as log:
            print(*numbers, file=log)

    RunLog.write = write  # type: ignore[assignment]


def watch_and_strike(rank: int, *, file: Path, strike: Strike) -> None:
    """Both."""
    watch(rank, file=file)
    strike(rank)


@pytest.mark.parametrize(
    ("num_epochs", "num_kills"), [(12, 1), pytest.param(300, 3, marks=pytest.mark.slow)]
)
def test_soak(num_epochs: int, num_kills: int, flags: list[str], tmp_path: Path) -> None:
    """Kills that part the epochs equally."""
    flags = [*flags, "--epochs", str(num_epochs), "--num-workers", "1", "--k", "20"]
    file = tmp_path / "watched"
    for _ in range(num_kills):
        strike = Strike("step", 3 * num_epochs // (num_kills + 1), signal.SIGKILL)
        hook = functools.partial(watch_and_strike, file=file, strike=strike)
        killed = start(flags, tmp_path, hook=hook)
        assert killed.wait(300) == [-9], killed.said()
        assert killed.orphans() == []
    ended = run(flags, tmp_path, hook=functools.partial(watch, file=file))
    assert ended.orphans() == []

    rows = [[int(word) for word in line.split()] for line in file.read_text().splitlines()]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == num_epochs
    for process in {row[0] for row in rows}:
        # The first epochs of a process fill its caches.
        memory, files, zombies = zip(*(row[1:] for row in rows if row[0] == process), strict=True)
        warm = len(memory) // 3
        slope = (memory[-1] - memory[warm]) / (len(memory) - 1 - warm)
        print(f"{len(memory)} epochs: {slope / 1e6:.3f} MB an epoch, {files[warm]} open files")
        assert slope < 1e6
        assert len(set(files[warm:])) == 1
        assert not any(zombies)
