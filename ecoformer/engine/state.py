"""How far a training run is, and the checkpoints that let it go on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ecoformer import __version__
from ecoformer.checkpoint import load_checkpoint
from ecoformer.config import Config, describe_changes
from ecoformer.engine.optim import (
    create_optimizer,
    create_schedule,
    restore_schedule,
    scale_learning_rate,
    schedule_state,
)
from ecoformer.engine.precision import create_scaler
from ecoformer.errors import InputError
from ecoformer.ranks import run_on_main, world_size
from ecoformer.sums import ExactMean

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler

    from ecoformer.engine.background import BackgroundWriter

LAST_CHECKPOINT = "last_checkpoint.pth"
BEST_CHECKPOINT = "best_checkpoint.pth"

# Settings that may differ when a run goes on: where things are and how they are computed, not
# what is computed.
_FREE_FIELDS = {
    "allow_missing",
    "allow_resume_change",
    "checkpoint_every",
    "compile",
    "config",
    "data_path",
    "device",
    "eval",
    "finetune",
    "max_bad_images",
    "num_workers",
    "output_dir",
    "pin_mem",
    "resume",
    "start_epoch",
    "throughput",
    "train_msa",
}
# Settings with a permission of their own; that of the rest is "config".
_PERMISSIONS = {"batch_size": "batch-size", "world_size": "world-size"}


@dataclass
class TrainState:
    """All that changes while a run trains.

    Random generators are not among it: each draw is seeded by epoch, step and rank.

    Args:
        model: the bare model, hash functions included.
        optimizer: over its parameters.
        schedule: of the learning rate.
        scaler: of float16 gradients; idle otherwise.
        loss: the losses of this epoch's steps.
        epoch: the epoch that is trained.
        step: batches of it that are done, on each rank.
        best_acc1: the best top-1 accuracy so far, percent.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: Scheduler
    scaler: torch.amp.GradScaler
    loss: ExactMean
    epoch: int = 0
    step: int = 0
    best_acc1: float = -1.0

    @classmethod
    def create(
        cls, model: nn.Module, config: Config, *, device: torch.device, amp_dtype: torch.dtype
    ) -> TrainState:
        """Prepare a training that has not begun.

        Args:
            model: the bare model, on the device.
            config: names optimiser and schedule, and the batch that scales the learning rate.
            device: where the model is.
            amp_dtype: from ``choose_amp_dtype``.

        Returns:
            The state before the first step.

        Raises:
            InputError: no such optimiser or schedule.
        """
        peak_lr = scale_learning_rate(
            config.optim, batch_size=config.data.batch_size, world_size=world_size()
        )
        optimizer = create_optimizer(model, config.optim, peak_lr)
        return cls(
            model=model,
            optimizer=optimizer,
            schedule=create_schedule(optimizer, config.optim, seed=config.run.seed),
            scaler=create_scaler(device, amp_dtype),
            loss=ExactMean(device),
        )

    @property
    def learning_rate(self) -> float:
        """That of the present epoch."""
        return float(self.optimizer.param_groups[0]["lr"])

    def finish_epoch(self, acc1: float) -> None:
        """Go on to the next epoch.

        Args:
            acc1: what a plateau schedule looks at.
        """
        self.schedule.step(self.epoch, acc1)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss = ExactMean(self.loss.device)

    def to_checkpoint(self, config: Config) -> dict[str, Any]:
        """Describe the state in tensors and plain values; every rank must ask.

        Args:
            config: of the run.

        Returns:
            The keys of released training files, with ``config`` for ``args``, and ours.
            ``epoch`` is the last finished one, -1 before that; ``step`` counts in the next.
        """
        import timm

        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": schedule_state(self.schedule),
            "epoch": self.epoch - 1,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "loss_sums": self.loss.sums(),
            "best_acc1": self.best_acc1,
            "config": _resolve(config),
            "world_size": world_size(),
            "versions": {
                "ecoformer": __version__,
                "torch": str(torch.__version__),
                "timm": timm.__version__,
            },
        }

    def restore(self, checkpoint: Mapping[str, Any], config: Config, origin: str) -> None:
        """Go on where a checkpoint was written.

        Args:
            checkpoint: from ``read_checkpoint``; of a released run too, which knows neither its
                best accuracy nor its configuration in a form to compare.
            config: of the present run.
            origin: what messages call the checkpoint.

        Raises:
            InputError: it holds weights only, it belongs to another model or optimiser, or the
                run was another one.
        """
        if not {"optimizer", "lr_scheduler", "epoch"} <= checkpoint.keys():
            raise InputError(
                f"{origin}: holds weights only, from which no run can go on; use --finetune to "
                "start from them, or --eval to measure them."
            )
        try:
            self._take(checkpoint, config, origin)
        except InputError:
            raise
        # What a damaged or foreign file holds in the place of numbers.
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{origin}: its training state does not fit this run ({error!r}); use --finetune "
                "to start from its weights."
            ) from error

    def _take(self, checkpoint: Mapping[str, Any], config: Config, origin: str) -> None:
        if "config" in checkpoint:
            _require_same_run(checkpoint, config, origin)
        load_checkpoint(self.model, checkpoint["model"], strict=True, origin=origin)
        _load_optimizer(self.optimizer, checkpoint["optimizer"])
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        last_epoch = int(checkpoint["epoch"])
        restore_schedule(self.schedule, checkpoint["lr_scheduler"], last_epoch=last_epoch)
        self.epoch, self.step = last_epoch + 1, int(checkpoint.get("step", 0))
        self.loss = ExactMean(self.loss.device, checkpoint.get("loss_sums", (0, 0, 0)))
        self.best_acc1 = float(checkpoint.get("best_acc1", -1.0))


def save_checkpoint(
    state: TrainState,
    config: Config,
    folder: Path,
    writer: BackgroundWriter,
    *,
    is_best: bool = False,
    is_last: bool = False,
) -> None:
    """Write the last checkpoint, and the best one before it where this is the best.

    A run that dies between the two does this epoch again, and the best one again with it.

    Args:
        state: what is saved; every rank must call.
        config: of the run.
        folder: the run's folder.
        writer: writes while training goes on.
        is_best: whether no earlier epoch was better.
        is_last: whether the run ends here, so that the files must be there afterwards.

    Raises:
        InputError: the disk refuses the run's last save; any other costs a warning.
        NonFiniteError: a weight is not finite, here or in the save before; nothing was written.
    """
    checkpoint = state.to_checkpoint(config)
    names = (BEST_CHECKPOINT, LAST_CHECKPOINT) if is_best else (LAST_CHECKPOINT,)
    write = writer.write_now if is_last else writer.write
    run_on_main(lambda: write(checkpoint, [folder / name for name in names]))


def _resolve(config: Config) -> dict[str, Any]:
    """The configuration, with the mode that follows from ``--finetune`` written out."""
    return config.to_flat() | {"train_mode": config.run.is_train_mode}


def _require_same_run(checkpoint: Mapping[str, Any], config: Config, origin: str) -> None:
    saved = {**checkpoint["config"], "world_size": checkpoint["world_size"]}
    present = {**_resolve(config), "world_size": world_size()}
    refused: dict[str, list[str]] = {}
    for name, change in describe_changes(saved, present).items():
        permission = _PERMISSIONS.get(name, "config")
        if name not in _FREE_FIELDS and permission not in config.run.allow_resume_change:
            refused.setdefault(permission, []).append(f"{name} {change}")
    if refused:
        changes = "; ".join(change for group in refused.values() for change in group)
        raise InputError(
            f"{origin}: belongs to a run with other settings ({changes}); repeat that run's "
            f"settings, allow the change with --allow-resume-change {' '.join(refused)}, or "
            "start anew with --resume none."
        )


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    constants = [name for name in optimizer.defaults if name != "lr"]
    present = [{name: group[name] for name in constants} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    # The state is the past's; constants that were allowed to change are the present's.
    for group, values in zip(optimizer.param_groups, present, strict=True):
        group.update(values)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            # Counters have no axes; all other tensors follow their parameter.
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimizer's {name} has shape {list(value.shape)} for a parameter of "
                    f"shape {list(parameter.shape)}"
                )
