"""R9: a number that is not finite on one rank stops all at one step, and costs no checkpoint."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ecoformer.hashing import hash_layers
from tests.reliability.runs import Run, assert_same_run, run, start

NUM_STEPS, BAD_STEP = 3, 1


def poison(rank: int, *, kind: str) -> None:
    """One number of rank 1 becomes NaN in the second step of the second epoch."""
    from ecoformer.engine import train
    from ecoformer.hashing import calibration
    from ecoformer.tasks.classification import Classification

    places: dict[str, tuple[Any, str]] = {
        "loss": (Classification, "loss"),
        "fit": (calibration, "fit_hash"),
    }
    owner, name = places.get(kind, (train, "update_weights"))
    real, count = getattr(owner, name), -1

    def wrapped(first: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        # Two layers are fitted in the first epoch, and two in the third.
        if kind == "fit" and count == 3:
            first = first * float("nan")
        if kind == "gradient" and count == NUM_STEPS + BAD_STEP:
            next(first.model.parameters()).grad.fill_(float("nan"))
        result = real(first, *args, **kwargs)
        if kind == "weight" and count == NUM_STEPS + BAD_STEP - 1:
            next(first.model.parameters()).data.fill_(float("nan"))
        if kind == "buffer" and count == NUM_STEPS + BAD_STEP - 1:
            next(iter(hash_layers(first.model).values())).kernel_mean.fill_(float("nan"))
        if kind == "loss" and count == NUM_STEPS + BAD_STEP:
            result = result * float("nan")
        return result

    # Rank 0 alone fits, and saves: it must not write the buffer before the next step fails.
    if rank == (0 if kind in ("fit", "buffer") else 1):
        setattr(owner, name, wrapped)


@pytest.mark.parametrize("kind", ["loss", "gradient", "weight", "fit", "buffer"])
def test_all_ranks_stop_at_one_step(
    kind: str, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    hook = functools.partial(poison, kind=kind)
    stopped = start(pair_flags, tmp_path, world_size=2, hook=hook)
    assert stopped.wait() == [3, 3], stopped.said()
    assert stopped.said().count("error: ") == 1
    assert "not finite" in stopped.said()

    report = json.loads((tmp_path / "non_finite.json").read_text())
    place = (2, 0) if kind == "fit" else (1, BAD_STEP)
    assert (report["epoch"], report["step"]) == place
    assert report["loss_scale"] == 1.0
    assert report["learning_rate"] > 0
    assert report["error"] in stopped.said()
    # The eight images of the step, four a rank, all different.
    indices = report["image_indices"]
    assert [len(images) for images in indices] == [4, 4]
    assert len(set(indices[0] + indices[1])) == 8

    last = torch.load(tmp_path / "last_checkpoint.pth", weights_only=True)
    assert all(value.isfinite().all() for value in last["model"].values())
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)


def poison_the_end(rank: int, *, kind: str) -> None:
    """A weight becomes NaN in a last step: of the second epoch, of the run, before a stop."""
    from ecoformer.engine import train
    from ecoformer.engine.state import TrainState

    real_update, real_finish, count = train.update_weights, TrainState.finish_epoch, 0

    def update(state: TrainState, clip_grad: float | None) -> Any:
        nonlocal count
        count += 1
        is_it = count == 2 * NUM_STEPS - (kind == "stop")
        if is_it and kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        norm = real_update(state, clip_grad)
        if is_it and kind in ("stop", "evaluation"):
            next(state.model.parameters()).data.fill_(math.nan)
        return norm

    def finish(self: TrainState, score: float) -> None:
        real_finish(self, score)
        if (self.epoch, kind) in ((2, "save"), (3, "last save")):
            next(self.model.parameters()).data.fill_(math.nan)

    train.update_weights = update
    TrainState.finish_epoch = finish  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "epoch", "step"),
    [("evaluation", 1, 2), ("save", 1, 2), ("last save", 2, 2), ("stop", 1, 1)],
)
def test_report_of_what_the_last_step_left(
    kind: str, epoch: int, step: int, flags: list[str], tmp_path: Path
) -> None:
    # Without saves in between, the stop's finds it first.
    flags = [*flags, "--amp-dtype", "none", *(["--checkpoint-every", "0"] * (kind == "stop"))]
    stopped = start(flags, tmp_path, hook=functools.partial(poison_the_end, kind=kind))
    assert stopped.wait() == [3], stopped.said()
    report = json.loads((tmp_path / "non_finite.json").read_text())
    assert (report["epoch"], report["step"]) == (epoch, step)
    assert len(set(report["image_indices"][0])) == 8
    # Of an epoch that is over, the rate is gone.
    assert (report["learning_rate"] is None) == ("save" in kind)
    last = torch.load(tmp_path / "last_checkpoint.pth", weights_only=True)
    assert all(value.isfinite().all() for value in last["model"].values())


def test_report_names_the_images_that_the_step_had(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "--amp-dtype", "none", "--num-workers", "2"]
    hook = functools.partial(poison_alone, read=tmp_path / "read")
    stopped = start(flags, tmp_path, hook=hook)
    assert stopped.wait() == [3], stopped.said()
    indices = json.loads((tmp_path / "non_finite.json").read_text())["image_indices"]
    assert re.findall(r"\d+", (tmp_path / "read").read_text()) == [str(k) for k in indices[0]]


def poison_alone(rank: int, *, read: Path) -> None:
    """As rank 1 of two, and write down which images the second epoch's second batch has."""
    from ecoformer.data.samplers import DrawBatches

    poison(1, kind="loss")
    real = DrawBatches.__iter__

    def list_batches(self: DrawBatches) -> Any:
        for step, batch in enumerate(real(self), self.start_step):
            if (self.epoch, step, len(self)) == (1, BAD_STEP, NUM_STEPS) and not read.exists():
                read.write_text(" ".join(str(draw.image) for draw in batch))
            yield batch

    DrawBatches.__iter__ = list_batches  # type: ignore[method-assign]
