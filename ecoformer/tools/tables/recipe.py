"""One small two-stage recipe, so that attention kinds and hash settings can be compared.

Stage 1 trains from nothing and stage 2 goes on at a lower rate. Kinds that softmax weights convert
to share one softmax stage 1 a seed; the others have a stage 1 of their own. So all see the same
number of epochs.
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ecoformer.attention import attention_class, attention_kinds
from ecoformer.engine.logs import read_log
from ecoformer.tools.tables.costs import find_family

# Light, since the runs are short, and fit for digits, which must not be flipped.
_FLAGS = (
    *("--no-repeated-aug", "--scale", "0.7", "1.0", "--hflip", "0", "--aa", "none"),
    *("--color-jitter", "0", "--reprob", "0", "--mixup", "0", "--cutmix", "0", "--drop-path", "0"),
    *("--min-lr", "1e-5", "--warmup-epochs", "0", "--num_workers", "2", "--no-pin-mem"),
)
_RATES = ("8e-3", "2e-3")


class CommandFailed(Exception):
    """A command inside this one failed, and has said why.

    Args:
        exit_code: its exit code.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


@dataclass(frozen=True)
class Recipe:
    """What all runs of a comparison share.

    Args:
        variant: the backbone.
        data_set: as ``--data-set`` takes it.
        data_path: as ``--data-path`` takes it; ``"DIGITS"`` needs none.
        input_size: image side, pixels.
        epochs: of stage 1 and of stage 2.
        batch_size: images a step; rates follow it.
        device: where they run.
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
            seed: of everything random.
            hashing: settings of ``HashConfig`` that are not the default.

        Returns:
            The records of ``log.txt`` of both stages, one an epoch.

        Raises:
            CommandFailed: a stage failed, and has said why.
        """
        hashing = hashing or {}
        parent = self.parent(attention)
        first = self.folder / f"seed{seed}" / f"{parent}_stage1"
        folder = "_".join([attention, *(f"{name}_{value}" for name, value in hashing.items())])
        second = first.with_name(folder)
        hash_flags = [word for name, value in hashing.items() for word in (f"--{name}", str(value))]
        weights = ["--finetune", str(first / "last_checkpoint.pth")]
        return [
            *self._run(parent, 0, seed, first, []),
            *self._run(attention, 1, seed, second, [*weights, *hash_flags]),
        ]

    def parent(self, attention: str) -> str:
        """Choose what stage 1 trains.

        Args:
            attention: kind of stage 2.

        Returns:
            Its kind of attention: softmax where that can be converted, the same kind elsewhere.
        """
        is_kind = attention in attention_kinds()
        return "msa" if is_kind and attention_class(attention).parent == "msa" else attention

    def _run(
        self, attention: str, stage: int, seed: int, folder: Path, flags: list[str]
    ) -> list[dict[str, float]]:
        """Run one stage in this process; a finished one is seen by its checkpoint, and left."""
        package = find_family(self.variant).name
        command = [
            *("--model", self.variant, "--attn_type", attention, "--seed", str(seed)),
            *("--data-set", self.data_set, "--input-size", str(self.input_size)),
            *(("--data-path", self.data_path) if self.data_path else ()),
            *("--batch-size", str(self.batch_size), "--epochs", str(self.epochs[stage])),
            *(
                "--output_dir",
                str(folder),
                "--device",
                str(self.device),
                *_FLAGS,
                "--lr",
                _RATES[stage],
                *flags,
            ),
        ]
        print(f"\n$ python -m {package}.main {shlex.join(command)}", flush=True)
        if code := importlib.import_module(f"{package}.main").main(command):
            raise CommandFailed(code)
        return read_log(folder)
