"""Train attention kinds and hash settings by one small recipe, so that they can be compared.

Stage 1 trains from nothing and stage 2 goes on at a lower rate. Kinds that softmax weights convert
to share one softmax stage 1 a seed; the others have a stage 1 of their own. So all see the same
number of epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ecoformer.attention import attention_class, attention_kinds
from ecoformer.engine.state import LAST_CHECKPOINT
from ecoformer.tools.runs import run_training

# Light, since the runs are short, and fit for digits, which must not be flipped.
_FIELDS: dict[str, object] = {
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
_RATES = (8e-3, 2e-3)


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
        self, attention: str, seed: int, hashing: Mapping[str, object] | None = None
    ) -> list[dict[str, float]]:
        """Run both stages, or what is left of them.

        Args:
            attention: kind of stage 2.
            hashing: settings of ``HashConfig`` that are not the default.

        Returns:
            The records of ``log.txt`` of both stages, one an epoch.

        Raises:
            InputError, NonFiniteError, Preempted: see ``ecoformer.engine.run.train``.
        """
        hashing = hashing or {}
        parent = self.parent(attention)
        first = self.folder / f"seed{seed}" / f"{parent}_stage1"
        folder = "_".join([attention, *(f"{name}_{value}" for name, value in hashing.items())])
        second = {"finetune": str(first / LAST_CHECKPOINT), **hashing}
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
        run = run_training(
            {
                "model": self.variant,
                "attn_type": attention,
                "seed": seed,
                "data_set": self.data_set,
                **({"data_path": self.data_path} if self.data_path else {}),
                "input_size": self.input_size,
                "batch_size": self.batch_size,
                "epochs": self.epochs[stage],
                "lr": _RATES[stage],
                "output_dir": str(folder),
                "device": str(self.device),
                **_FIELDS,
                **fields,
            }
        )
        return run.log
