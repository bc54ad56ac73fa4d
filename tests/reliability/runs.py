"""Whole runs in processes of their own, and what happens to them at a chosen moment.

Each is forked from one process that has its imports behind it.
"""

from __future__ import annotations

import io
import os
import pkgutil
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecoformer.engine.command import run_command
from ecoformer.models.registry import ModelFamily
from tests.engine.ranks import torchrun_environments, warm_context
from tests.engine.training import assert_same_state
from tests.tiny import TinyModel

LAST, BEST = "last_checkpoint.pth", "best_checkpoint.pth"


class TinyFamily(ModelFamily):
    def create_model(
        self, variant: str, attention: str | None = None, **keywords: Any
    ) -> nn.Module:
        """Two blocks of two heads, drop path on; 64 tokens of a 32 px image."""
        model = TinyModel(keywords["hashing"])
        model.head = nn.Linear(8, keywords["num_classes"])
        return model


TINY = TinyFamily("tiny", {"tiny": ("ecoformer",)}, "tiny")

# Runs in a rank's process before the run, to change what happens there.
Hook = Callable[[int], None]


@dataclass
class Run:
    """The ranks of a run.

    Args:
        folder: its output folder.
        processes: one a rank; each leads a session of its own.
    """

    folder: Path
    processes: Sequence[BaseProcess]

    def wait(self, timeout_s: float = 60.0) -> list[int | None]:
        """Exit codes by rank; -9 for a rank that was killed, None for one that is still there."""
        end = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def said(self) -> str:
        """What all ranks printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("said.*")))

    def orphans(self) -> list[int]:
        """Processes that the ranks started and that outlive them."""
        return find_orphans([process.pid for process in self.processes])


def find_orphans(sessions: Sequence[int | None], timeout_s: float = 10.0) -> list[int]:
    """Processes of some sessions that are still there after some time."""
    end = time.monotonic() + timeout_s
    while True:
        left = [pid for pid, session in _list_sessions() if session in sessions]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def start(
    flags: Sequence[str],
    folder: Path,
    *,
    world_size: int = 1,
    hook: Hook | None = None,
    own_flags: Sequence[Sequence[str]] = (),
) -> Run:
    """Start a run.

    Args:
        flags: of the command.
        folder: where it writes.
        world_size: ranks; one runs without a process group, as without torchrun.
        hook: of a module's top level, or a ``partial`` of such.
        own_flags: those of each rank alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environments = torchrun_environments(world_size) if world_size > 1 else [{}]
    command = [*flags, "--output_dir", str(folder)]
    processes = []
    for rank, environment in enumerate(environments):
        said = folder / f"said.{rank}"
        words = [*command, *(own_flags[rank] if own_flags else [])]
        process = warm_context().Process(target=_enter, args=(rank, environment, words, said, hook))
        process.start()
        processes.append(process)
    return Run(folder, processes)


def run(flags: Sequence[str], folder: Path, **options: Any) -> Run:
    """Start a run that is to end well, and wait for it."""
    found = start(flags, folder, **options)
    codes = found.wait()
    assert not any(codes), f"{codes}\n{found.said()}"
    return found


def assert_same_run(one: Run, other: Run) -> None:
    """Both left the same weights, optimiser, schedule, scaler, metrics and log, bit by bit."""
    for name in (LAST, BEST):
        assert_same_state(one.folder / name, other.folder / name)
    assert (one.folder / "log.txt").read_bytes() == (other.folder / "log.txt").read_bytes()
    assert not list(one.folder.glob(".*")), "a half file is left"


def _enter(
    rank: int, environment: dict[str, str], command: list[str], said: Path, hook: Hook | None
) -> None:
    lead_session(said)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        # As a terminal has them, also where nohup runs the tests.
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(environment)
    if hook is not None:
        hook(rank)
    raise SystemExit(run_command(command, TINY))


def lead_session(said: Path) -> None:
    """Tell this process and its children from others, and let them print into a file."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _list_sessions() -> list[tuple[int, int]]:
    """(process, its session) of all that live; zombies do not."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *numbers = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            found.append((int(path.parent.name), int(numbers[2])))
    return found


@dataclass(frozen=True)
class Strike:
    """A signal to a rank, from inside, at a moment that a clock could not hit.

    Args:
        phase: what is going on.
        number: which of its occurrences, from 0.
        sent: the signal.
        rank: who gets it.
        is_hanging: the phase does not end by itself then.
    """

    phase: str
    number: int
    sent: signal.Signals
    rank: int = 0
    is_hanging: bool = False

    def __call__(self, rank: int) -> None:
        """Arm it in a rank's process."""
        if rank == self.rank:
            _PHASES[self.phase](self)

    def hit(self, count: int, pid: int | None = None) -> None:
        """Strike if this is the moment."""
        if count == self.number:
            print("struck at", time.time(), flush=True)
            os.kill(pid or os.getpid(), self.sent)
            if self.is_hanging:
                time.sleep(600)


def patch(place: str, name: str, strike: Strike) -> None:
    """Strike at the start of a function's call, in all that look it up in ``"module:class"``."""
    owner = pkgutil.resolve_name(place)
    real, count = getattr(owner, name), -1

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        strike.hit(count)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def _patch_write(strike: Strike) -> None:
    """Half of a checkpoint is on the disk."""
    from ecoformer.checkpoint import files

    real, count = torch.save, -1

    def save(value: object, file: Any) -> None:
        nonlocal count
        count += 1
        content = io.BytesIO()
        real(value, content)
        half = len(content.getvalue()) // 2
        file.write(content.getvalue()[:half])
        file.flush()
        strike.hit(count)
        file.write(content.getvalue()[half:])

    setattr(files.torch, "save", save)  # noqa: B010 - of another type, for mypy


def _patch_read(strike: Strike) -> None:
    """An image does not come; where workers read, the trainer gets the signal."""
    from ecoformer.data.loaders import SampleReader

    real, trainer = SampleReader.__getitem__, os.getpid()

    def read(self: SampleReader, draw: Any) -> Any:
        # Each worker counts for itself, so the first image that it reads.
        strike.hit(read_count(), trainer)
        return real(self, draw)

    count = -1

    def read_count() -> int:
        nonlocal count
        count += 1
        return count

    SampleReader.__getitem__ = read  # type: ignore[method-assign]


_CLASSIFICATION = "ecoformer.tasks.classification"
_PHASES: dict[str, Callable[[Strike], None]] = {
    "meeting": lambda strike: patch("torch.distributed", "init_process_group", strike),
    "step": lambda strike: patch("ecoformer.engine.train", "update_weights", strike),
    "fit": lambda strike: patch("ecoformer.hashing.calibration", "fit_hash", strike),
    "evaluation": lambda strike: patch(f"{_CLASSIFICATION}:AccuracyMeter", "add", strike),
    "write": _patch_write,
    "flush": lambda strike: patch("os", "fsync", strike),
    "rename": lambda strike: patch("os", "replace", strike),
    "data": _patch_read,
}
# Times that a phase occurs at least in the tests' command.
_OCCURRENCES = {"step": 9, "fit": 4, "evaluation": 9, "write": 9, "flush": 9, "rename": 9}


def draw_strikes(
    num_strikes: int, seed: int, sent: signal.Signals, *, rank: int = 0
) -> list[Strike]:
    """Seeded moments in steps, fits, evaluations and saves in turn."""
    draw = random.Random(seed)
    turns = [["step"], ["fit"], ["evaluation"], ["write", "flush", "rename"]]
    phases = [draw.choice(turns[index % len(turns)]) for index in range(num_strikes)]
    return [Strike(phase, draw.randrange(_OCCURRENCES[phase]), sent, rank) for phase in phases]
