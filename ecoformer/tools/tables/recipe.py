"""Train attention kinds and hash settings by one small recipe, so that they can be compared.

Stage 1 trains from nothing and stage 2 goes on at a lower rate. Kinds that softmax weights convert
to share one softmax stage 1 a seed; the others have a stage 1 of their own. So all see the same
number of epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecoformer.attention import attention_class, attention_kinds
from ecoformer.engine.state import LAST_CHECKPOINT
from ecoformer.models.registry import find_family
from ecoformer.tools.runs import run_training

# Light, since the runs are short, and fit for digits, which must not be flipped.
LIGHT: dict[str, Any] = {
    "repeated_aug": False,
    "scale": (0.7, 1.0),
    "hflip": 0.0,
    "aa": None,
    "color_jitter": 0.0,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path": 0.0,
    "min_lr": 1e-5,
    "warmup_epochs": 0,
    "num_workers": 2,
    "pin_mem": False,
}
# Of stage 1, unless the family's recipe is for small data and has a rate of its own.
_RATE = 8e-3
_STAGE2_RATE_RATIO = 0.25


def name_run(attention: str, settings: Mapping[str, object]) -> str:
    """Name the folder of a run after what tells it from the others of its comparison."""
    return "_".join([attention, *(f"{name}_{value}" for name, value in settings.items())])


@dataclass(frozen=True)
class Recipe:
    """What all runs of a comparison share; data are named as the flags take them.

    Args:
        input_size: image side, pixels.
        epochs: of stage 1 and of stage 2.
        batch_size: images a step; rates follow it.
        folder: where the runs' folders lie.
    """

    variant: str
    data_set: str
    data_path: str | None
    input_size: int
    epochs: tuple[int, int]
    batch_size: int
    device: torch.device
    folder: Path

    def train(
        self,
        attention: str,
        seed: int,
        hashing: Mapping[str, object] | None = None,
        fields: Mapping[str, object] | None = None,
    ) -> list[dict[str, float]]:
        """Run both stages, or what is left of them.

        Args:
            attention: kind of stage 2.
            hashing: settings of ``HashConfig`` that are not the default.
            fields: other settings of stage 2; where it distils, stage 1 is the teacher.

        Returns:
            The records of ``log.txt`` of both stages, one an epoch.

        Raises:
            InputError, NonFiniteError, Preempted: see ``ecoformer.engine.run.train``.
        """
        settings = {**(hashing or {}), **(fields or {})}
        parent = self.parent(attention)
        first = self.folder / f"seed{seed}" / f"{parent}_stage1"
        folder = name_run(attention, settings)
        start = str(first / LAST_CHECKPOINT)
        second = {"finetune": start, **settings}
        if "distill" in settings:
            second["teacher"] = start
        return [
            *self._run(parent, 0, seed, first, {}),
            *self._run(attention, 1, seed, first.with_name(folder), second),
        ]

    def parent(self, attention: str) -> str:
        """Choose what stage 1 trains: softmax where that can be converted, else the same kind."""
        is_kind = attention in attention_kinds()
        return "msa" if is_kind and attention_class(attention).parent == "msa" else attention

    def _run(
        self, attention: str, stage: int, seed: int, folder: Path, fields: Mapping[str, object]
    ) -> list[dict[str, float]]:
        own = find_family(self.variant).recipe
        recipe = {"lr": _RATE, **LIGHT, **(own if "lr" in own else {})}
        run = run_training(
            {
                **recipe,
                "lr": recipe["lr"] * (_STAGE2_RATE_RATIO if stage else 1),
                "model": self.variant,
                "attn_type": attention,
                "seed": seed,
                "data_set": self.data_set,
                **({"data_path": self.data_path} if self.data_path else {}),
                "input_size": self.input_size,
                "batch_size": self.batch_size,
                "epochs": self.epochs[stage],
                "output_dir": str(folder),
                "device": str(self.device),
                **fields,
            }
        )
        return run.log
