"""Attention kinds on ListOps and Pathfinder, in fewer steps than were published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ecoformer.config import Config, make_config
from ecoformer.engine.optim import scale_learning_rate
from ecoformer.errors import InputError
from ecoformer.tools.runs import run_training
from ecoformer.tools.table import Column, Row, Value
from ecoformer.tools.tables.ablations import Arm, list_arms
from ecoformer.tools.tables.recipe import name_run
from ecoformer.tools.tables.seeds import describe_curves, seed_columns, seed_notes

SEQUENCE_COLUMNS = (
    Column("data", "data"),
    Column("name", "attention"),
    Column("protocol", "protocol"),
    Column("steps", "steps", ".0f"),
    *seed_columns(),
    Column("published", "published top-1 %"),
)
_VARIANT = "encoder"
# Top-1, percent, by data set and kind: after 50,000 steps in Skyformer's harness, arXiv 2111.00035,
# whose protocol the configurations hold.
PUBLISHED = {
    "LISTOPS": {
        "softmax": 38.37,
        "Performer": 38.02,
        "Reformer": 37.68,
        "Linformer": 37.45,
        "Nystromformer": 38.51,
    },
    "PATHFINDER": {
        "softmax": 65.26,
        "Performer": 66.30,
        "Reformer": 66.49,
        "Linformer": 60.93,
        "Nystromformer": 69.48,
    },
}


@dataclass(frozen=True)
class ShortProtocol:
    """The full protocol's configuration, cut in steps and in sequences to evaluate on.

    Args:
        configs: folder of the full protocols, one file a data set.
        steps: of an epoch, after each of which the rate falls.
        eval_samples: held-out sequences.
        folder: where the runs' folders lie.
    """

    configs: Path
    epochs: int
    steps: int
    eval_samples: int
    device: torch.device
    folder: Path

    def find(self, data_set: str) -> Path:
        """Find the full protocol of a data set.

        Raises:
            InputError: there is no such file.
        """
        path = self.configs / f"{data_set.lower()}.py"
        if not path.is_file():
            raise InputError(f"--configs {self.configs} holds no {path.name}; run it from a clone.")
        return path

    def read(self, data_set: str) -> Config:
        """Read the full protocol of a data set."""
        return make_config(config=str(self.find(data_set)))

    def train(self, data_set: str, arm: Arm, seed: int) -> list[dict[str, float]]:
        """Train a kind from nothing, or what is left of it.

        Returns:
            The records of ``log.txt``, one an epoch.

        Raises:
            InputError, NonFiniteError, Preempted: see ``ecoformer.engine.run.train``.
        """
        folder = self.folder / data_set / f"seed{seed}" / name_run(arm.attention, arm.hashing)
        run = run_training(
            {
                "config": str(self.find(data_set)),
                "attn_type": arm.attention,
                "seed": seed,
                "epochs": self.epochs,
                "epoch_samples": self.steps * self.read(data_set).data.batch_size,
                "eval_samples": self.eval_samples,
                # An epoch of it would be a large part of all.
                "warmup_epochs": 0,
                "num_workers": 2,
                "output_dir": str(folder),
                "device": str(self.device),
                **arm.hashing,
            }
        )
        return run.log


def run_sequences(
    data_sets: Sequence[str], protocol: ShortProtocol, seeds: Sequence[int]
) -> list[dict[str, Value]]:
    """Train all kinds of the encoder, or what is left of it; published rows follow each data set.

    Returns:
        Rows for ``SEQUENCE_COLUMNS``, and the accuracy after each epoch of each seed.

    Raises:
        InputError, NonFiniteError, Preempted: see ``ecoformer.engine.run.train``.
    """
    arms = list_arms("kinds", _VARIANT)
    for data_set in data_sets:
        protocol.find(data_set)
    curves: dict[tuple[str, str], dict[int, list[float]]] = {}
    # The first seed is complete before the second begins.
    for seed in seeds:
        for data_set in data_sets:
            for arm in arms:
                records = protocol.train(data_set, arm, seed)
                curve = [record["test_acc1"] for record in records]
                curves.setdefault((data_set, arm.name), {})[seed] = curve
    rows: list[dict[str, Value]] = []
    for data_set in data_sets:
        first = curves[data_set, arms[0].name]
        for arm in arms:
            row: dict[str, Value] = {
                **{"data": data_set, "name": arm.name, "protocol": "short"},
                "steps": protocol.epochs * protocol.steps,
            }
            row |= describe_curves(curves[data_set, arm.name], first if arm is not arms[0] else {})
            rows.append(row)
        full: dict[str, Value] = {"data": data_set, "protocol": "full, published", "steps": 50_000}
        rows += [full | {"name": n, "published": top1} for n, top1 in PUBLISHED[data_set].items()]
    return rows


def describe_protocol(
    data_sets: Sequence[str], protocol: ShortProtocol, rows: Sequence[Row]
) -> list[str]:
    """Tell a reader how the rows of ``run_sequences`` were made, in notes below the table."""
    batches = [f"of {_describe_batch(name, protocol.read(name))}" for name in data_sets]
    notes = [
        f"short: {protocol.epochs} x {protocol.steps} steps, every kind from nothing, "
        f"{' and '.join(batches)}; it falls after each of these epochs, to 0 in the end, without "
        f"warm-up. All else is that of {protocol.configs}.",
        f"top-1 is that after the last epoch, of {protocol.eval_samples:,} held-out sequences (or "
        "all, if there are fewer), the same for every row; nothing is chosen by it. Chance is 10 % "
        "for LISTOPS and 50 % for PATHFINDER. The first row of a data set is its softmax.",
        "full, published: figures of Skyformer's harness (arXiv 2111.00035) for its own files, "
        "whose classes are not balanced, after 50,000 steps of 32 sequences of up to 2,000 tokens "
        "at 1e-4 for LISTOPS, of 128 of 1,024 at 2e-4 for PATHFINDER. They stand in a column of "
        "their own: a short figure says how far a kind is by then, and nothing of what it reaches.",
    ]
    return [*notes, *seed_notes(rows)]


def _describe_batch(data_set: str, config: Config) -> str:
    batch_size = config.data.batch_size
    rate = scale_learning_rate(config.optim, batch_size=batch_size, world_size=1)
    tokens = f"{config.model.max_tokens:,} tokens"
    return f"{batch_size} sequences of {data_set}, up to {tokens}, at a peak rate of {rate:g}"
