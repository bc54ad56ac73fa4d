"""Saves: what a disk that refuses does to a run (R7), and what a save costs."""

from __future__ import annotations

import errno
import functools
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ecoformer.checkpoint import read_checkpoint
from ecoformer.engine.folder import RunFolder
from ecoformer.engine.saving import BackgroundWriter, Saver
from ecoformer.engine.state import LAST_CHECKPOINT
from tests.engine.training import start as start_state
from tests.reliability.runs import LAST, Run, assert_same_run, run, start


def fill_disk(rank: int, *, first: int, last: int) -> None:
    """Some renames fail, in the order of the run's saves."""
    real, count = os.replace, -1

    def replace(source: Path, target: Path) -> None:
        nonlocal count
        count += str(target).endswith(".pth")
        if first <= count <= last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    os.replace = replace  # type: ignore[assignment]


def test_a_failed_periodic_save_warns(flags: list[str], whole: Run, tmp_path: Path) -> None:
    # The first epoch's saves are three in mid-epoch, then the best and the last at its end.
    found = run(flags, tmp_path, hook=functools.partial(fill_disk, first=1, last=2))
    assert found.said().count("No space left on device") == 2
    assert "goes on without this checkpoint" in found.said()
    assert_same_run(found, whole)


def test_a_failed_last_save_fails_the_run(flags: list[str], whole: Run, tmp_path: Path) -> None:
    found = start(flags, tmp_path, hook=functools.partial(fill_disk, first=5, last=99))
    assert found.wait() == [2], found.said()
    assert found.said().splitlines()[-1].startswith("error: ")
    assert "No space left on device" in found.said().splitlines()[-1]
    assert read_checkpoint(tmp_path / LAST)["epoch"] == 0
    assert_same_run(run(flags, tmp_path), whole)


def test_copies_are_of_their_moment(tmp_path: Path) -> None:
    checkpoint: dict[str, Any] = {
        "model": {"w": torch.zeros(3)},
        "steps": [torch.tensor(1), (2, "x")],
    }
    with BackgroundWriter() as writer:
        writer.write(checkpoint, [tmp_path / "a.pth"])
        checkpoint["model"]["w"] += 1
        writer.write(checkpoint, [tmp_path / "b.pth"])
        checkpoint["model"]["w"] += 1
    for name, value in (("a", 0), ("b", 1)):
        found = read_checkpoint(tmp_path / f"{name}.pth")
        assert torch.equal(found["model"]["w"], torch.full((3,), float(value)))
        assert found["steps"] == [torch.tensor(1), (2, "x")]


@pytest.mark.slow
def test_cost_of_a_save(tmp_path: Path) -> None:
    """100 MB with AdamW's moments, in turns with a plain ``torch.save``; medians."""
    state, config = start_state(
        nn.Sequential(*(nn.Linear(500, 833) for _ in range(20))),
        opt="adamw",
        output_dir=str(tmp_path),
    )
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    times_s = []
    with Saver(state, config, RunFolder(tmp_path)) as saver:
        # The first rounds make files and fill memory.
        for _ in range(53):
            began = time.perf_counter()
            torch.save(state.to_checkpoint(config), tmp_path / "plain.pth")
            plain = time.perf_counter() - began
            began = time.perf_counter()
            saver.save()
            stop = time.perf_counter() - began
            saver.wait()
            times_s.append((plain, stop, time.perf_counter() - began))
    plain, stop, total = (statistics.median(column) for column in zip(*times_s[3:], strict=True))
    size = (tmp_path / LAST_CHECKPOINT).stat().st_size
    print(
        f"{size / 1e6:.0f} MB: plain {plain:.3f} s, stop {stop:.3f} s ({stop / plain:.0%}), "
        f"total {total:.3f} s ({total / plain:.2f} x)"
    )
    assert size == pytest.approx(100e6, rel=0.02)
    # Loose: a test is no benchmark.
    assert stop < 0.7 * plain
    assert total < 2.5 * plain
