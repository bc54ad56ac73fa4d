"""One run a folder, and a folder that stays where it is."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ecoformer.engine.folder import LOCK
from tests.reliability.runs import Run, Strike, assert_same_run, run, start


def wait_for(text: str, found: Run) -> None:
    end = time.monotonic() + 60
    while text not in found.said():
        assert time.monotonic() < end, found.said()
        time.sleep(0.05)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_run_is_refused_and_the_first_unharmed(
    world_size: int,
    pair_flags: list[str],
    whole_pair: Run,
    flags: list[str],
    whole: Run,
    tmp_path: Path,
) -> None:
    settings, expected = (flags, whole) if world_size == 1 else (pair_flags, whole_pair)
    first = start(settings, tmp_path, world_size=world_size, hook=Strike("step", 4, signal.SIGSTOP))
    wait_for("struck at", first)
    files = {path: path.read_bytes() for path in tmp_path.glob("*.pth")}
    second = start(
        settings,
        tmp_path / "second",
        world_size=world_size,
        own_flags=[["--output_dir", str(tmp_path)]] * world_size,
    )
    assert second.wait() == [2] * world_size, second.said()
    assert second.said().count("error: ") == 1
    assert f"another run writes there (process {first.processes[0].pid} on " in second.said()
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pth")} == files
    pid = first.processes[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGCONT)
    assert first.wait() == [0] * world_size, first.said()
    assert_same_run(first, expected)
    assert not (tmp_path / LOCK).exists()


def lose_locks(rank: int) -> None:
    """As a network disk whose server keeps none."""

    def lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.lockf = lock


def test_a_disk_without_locks_is_said_to_have_none(
    flags: list[str], whole: Run, tmp_path: Path
) -> None:
    found = run(flags, tmp_path, hook=lose_locks)
    assert "has no locks (No locks available), so nothing keeps a second run out" in found.said()
    assert_same_run(found, whole)


def remove(folder: Path) -> None:
    # The saver renames files while they are removed.
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def lose_folder(rank: int, *, folder: Path, lose: Callable[[Path], None]) -> None:
    """In the fifth step."""
    from ecoformer.engine import train

    real, count = train.update_weights, 0

    def update(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 5 and rank == 0:
            lose(folder)
        return real(*arguments)  # type: ignore[arg-type]

    train.update_weights = update  # type: ignore[assignment]


@pytest.mark.parametrize("lose", [remove, rename])
@pytest.mark.parametrize("saves", ["1e-6", "0"])
def test_a_lost_folder_stops_the_run(
    saves: str, lose: Callable[[Path], None], flags: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    found = start(
        [*flags, "--checkpoint-every", saves],
        tmp_path,
        hook=functools.partial(lose_folder, folder=folder, lose=lose),
        own_flags=[["--output_dir", str(folder)]],
    )
    assert found.wait() == [2], found.said()
    last = found.said().splitlines()[-1]
    assert last.startswith("error: ")
    assert "was removed or renamed" in last
    assert "Traceback" not in found.said()
    assert not folder.exists()
