"""Detection and segmentation of SCENES: softmax, and EcoFormer that is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecoformer.data.scenes import open_scenes
from ecoformer.engine.state import LAST_CHECKPOINT
from ecoformer.models.registry import find_family
from ecoformer.tools.runs import run_training
from ecoformer.tools.table import Column, Row, Value
from ecoformer.tools.tables.recipe import LIGHT
from ecoformer.tools.tables.seeds import describe_curves, seed_columns, seed_notes

SCENE_COLUMNS = (
    Column("task", "task"),
    Column("name", "attention"),
    Column("measure", "measure"),
    *seed_columns("%", "score"),
)
# What each task is measured by.
_MEASURES = {"detection": "AP", "segmentation": "mIoU"}
_PARENT = "msa"
_KINDS = (_PARENT, "ecoformer")
# Of a classifier of digits, which the backbone starts from.
_CLASSIFIER: dict[str, Any] = {
    **LIGHT,
    "data_set": "DIGITS",
    "input_size": 64,
    "batch_size": 32,
    "epochs": 8,
    "lr": 0.016,
    "amp_dtype": "bfloat16",
    "num_workers": 0,
}
_DENSE: dict[str, Any] = {
    "data_set": "SCENES",
    "sched": "cosine",
    "warmup_epochs": 0,
    "drop_path": 0.0,
    "clip_grad": 1.0,
    # Its convolutions take half the time of float32 on a CPU.
    "amp_dtype": "bfloat16",
    "num_workers": 0,
}
# For 512 canvases a step; stage 2 a quarter of it.
_RATE, _STAGE2_RATE = 0.0256, 0.0064


@dataclass(frozen=True)
class SceneProtocol:
    """What all runs of the table share.

    Args:
        side: of a canvas, pixels.
        epochs: of stage 1 and of stage 2.
        steps: of an epoch, after each of which the rate falls.
        batch_size: canvases a step; rates follow it.
        folder: where the runs' folders lie.
    """

    variant: str
    side: int
    epochs: tuple[int, int]
    steps: int
    batch_size: int
    device: torch.device
    folder: Path

    def train(self, task: str, kind: str, seed: int) -> list[dict[str, float]]:
        """Train what a row stands for, from the classifier on, or what is left of it.

        Returns:
            The records of ``log.txt`` of both stages, one an epoch.

        Raises:
            InputError, NonFiniteError, Preempted: see ``ecoformer.engine.run.train``.
        """
        folder = self.folder / f"seed{seed}"
        shared = {"model": self.variant, "seed": seed, "device": str(self.device)}
        classifier = folder / "classifier"
        run_training({**shared, **_CLASSIFIER, "attn_type": _PARENT, "output_dir": str(classifier)})
        dense = {**shared, **_DENSE, "task": task, "short_side": self.side}
        dense |= {
            "batch_size": self.batch_size,
            "epoch_samples": self.steps * self.batch_size,
        }
        first = folder / f"{task}_stage1"
        stages = (
            (_PARENT, first, classifier, _RATE),
            (kind, folder / f"{task}_{kind}", first, _STAGE2_RATE),
        )
        records = []
        for (attention, output, start, rate), epochs in zip(stages, self.epochs, strict=True):
            run = run_training(
                {
                    **dense,
                    "attn_type": attention,
                    "epochs": epochs,
                    "lr": rate,
                    "finetune": str(start / LAST_CHECKPOINT),
                    "output_dir": str(output),
                }
            )
            records += run.log
        return records


def run_scenes(protocol: SceneProtocol, seeds: Sequence[int]) -> list[dict[str, Value]]:
    """Train all rows, or what is left of them.

    Returns:
        Rows for ``SCENE_COLUMNS``, and the measure after each epoch of each seed.

    Raises:
        InputError, NonFiniteError, Preempted: see ``ecoformer.engine.run.train``.
    """
    # First: what can be refused, before anything is trained.
    open_scenes(None, "val", side=protocol.side)
    for kind in _KINDS:
        find_family(protocol.variant).check(protocol.variant, kind)
    curves: dict[tuple[str, str], dict[int, list[float]]] = {}
    # The first seed is complete before the second begins.
    for seed in seeds:
        for task, measure in _MEASURES.items():
            for kind in _KINDS:
                records = protocol.train(task, kind, seed)
                curve = [record[f"test_{measure}"] for record in records]
                curves.setdefault((task, kind), {})[seed] = curve
    rows: list[dict[str, Value]] = []
    for (task, kind), by_seed in curves.items():
        row: dict[str, Value] = {"task": task, "measure": _MEASURES[task]}
        row["name"] = find_family(protocol.variant).label(kind)
        baseline = curves[task, _PARENT] if kind != _PARENT else {}
        row |= describe_curves(by_seed, baseline, key="score")
        rows.append(row)
    return rows


def describe_scenes(protocol: SceneProtocol, rows: Sequence[Row]) -> list[str]:
    """Tell a reader how the rows of ``run_scenes`` were made, in notes below the table."""
    first, second = protocol.epochs
    notes = [
        f"{protocol.variant}, canvases of {protocol.side} px, {first} + {second} epochs of "
        f"{protocol.steps} steps of {protocol.batch_size}, in bfloat16: a softmax classifier of "
        "DIGITS a seed starts the backbone, a softmax network of the task stage 2, which goes on "
        "at a quarter of the rate; all rows see as many canvases.",
        "The measure is that after the last epoch, over all 500 held-out canvases; nothing is "
        "chosen by it. The first row of a task is its softmax. So short a training compares kinds, "
        "and says little of what they reach in the end.",
    ]
    return [*notes, *seed_notes(rows, key="score")]
