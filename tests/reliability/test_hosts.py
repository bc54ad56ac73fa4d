"""Hosts that do not see one disk: their ranks go on from one state, or not at all."""

from __future__ import annotations

import functools
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.reliability.runs import LAST, Run, Strike, assert_same_run, start


@pytest.fixture(scope="module")
def early(pair_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks that were stopped in the second epoch."""
    folder = tmp_path_factory.mktemp("early")
    stopped = start(
        pair_flags, folder, world_size=2, hook=Strike("step", 4, signal.SIGTERM, rank=1)
    )
    assert stopped.wait() == [75, 75], stopped.said()
    return stopped


def go_on(flags: Sequence[str], folder: Path, sources: Sequence[Run | None]) -> Run:
    """Two ranks, each with a folder of its own that holds the last checkpoint of a run."""
    own_flags = []
    for number, source in enumerate(sources):
        own = folder / f"host{number}"
        own.mkdir()
        if source is not None:
            for path in (*source.folder.glob("*.pth"), source.folder / "log.txt"):
                shutil.copy(path, own)
        own_flags.append(["--output_dir", str(own)])
    return start(flags, folder, world_size=2, own_flags=own_flags)


def assert_refused(found: Run, *words: str) -> None:
    assert found.wait(30) == [2, 2], found.said()
    said = found.said()
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    for word in words:
        assert word in said.splitlines()[-1]


def test_other_checkpoints_are_refused(
    pair_flags: list[str], early: Run, whole_pair: Run, tmp_path: Path
) -> None:
    found = go_on(pair_flags, tmp_path, [early, whole_pair])
    before = (tmp_path / "host0" / LAST).read_bytes()
    assert_refused(found, "epoch 1, step 2", "epoch 3, step 0", "a disk that all hosts share")
    assert (tmp_path / "host0" / LAST).read_bytes() == before


@pytest.mark.parametrize("owner", [0, 1])
def test_a_checkpoint_on_one_host_alone_is_refused(
    owner: int, pair_flags: list[str], early: Run, tmp_path: Path
) -> None:
    sources = [early if number == owner else None for number in range(2)]
    found = go_on(pair_flags, tmp_path, sources)
    assert_refused(found, "no checkpoint", LAST, "a disk that all hosts share")


def test_equal_checkpoints_go_on(
    pair_flags: list[str], early: Run, whole_pair: Run, tmp_path: Path
) -> None:
    found = go_on(pair_flags, tmp_path, [early, early])
    assert found.wait() == [0, 0], found.said()
    assert_same_run(Run(tmp_path / "host0", found.processes), whole_pair)


def test_other_weights_are_not_evaluated_as_one(
    pair_flags: list[str], early: Run, whole_pair: Run, tmp_path: Path
) -> None:
    found = go_on([*pair_flags, "--eval"], tmp_path, [early, whole_pair])
    assert_refused(found, "holds other weights")


def test_other_data_are_refused(pair_flags: list[str], image_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "images"
    shutil.copytree(image_folder, other)
    next((other / "train" / "class0").iterdir()).unlink()
    own_flags = [["--data-path", str(path)] for path in (image_folder, other)]
    found = start(pair_flags, tmp_path / "run", world_size=2, own_flags=own_flags)
    assert_refused(found, "holds other data on rank 1")


def leave(rank: int, *, missing: int) -> None:
    if rank == missing:
        raise SystemExit(0)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_never_comes_is_not_waited_for(
    missing: int, pair_flags: list[str], tmp_path: Path
) -> None:
    flags = [*pair_flags, "--dist-timeout", "0.05"]
    hook = functools.partial(leave, missing=missing)
    found = start(flags, tmp_path, world_size=2, hook=hook)
    assert found.wait(63)[1 - missing] == 1, found.said()
    [line] = [line for line in found.said().splitlines() if "error: " in line]
    assert f"rank {1 - missing} did not meet the others at 127.0.0.1:" in line
    assert "--dist-timeout 0.05" in line
    assert "Traceback" not in found.said()
