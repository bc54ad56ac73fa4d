"""How far a training run is, as an object and as a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ecoformer import __version__
from ecoformer.config import Config
from ecoformer.engine.optim import (
    create_optimizer,
    create_schedule,
    scale_learning_rate,
    schedule_state,
)
from ecoformer.engine.precision import create_scaler
from ecoformer.ops.backends import default_backend
from ecoformer.ranks import world_size
from ecoformer.sums import ExactMean

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler

LAST_CHECKPOINT = "last_checkpoint.pth"
BEST_CHECKPOINT = "best_checkpoint.pth"


@dataclass
class TrainState:
    """All that changes while a run trains; no generator: epoch, step and rank seed each draw.

    Args:
        model: the bare model, hash functions included.
        loss: the losses of this epoch's steps.
        step: batches of ``epoch`` that are done, on each rank.
        best_score: ``Metrics.score`` of the best epoch so far.
        data: what identifies the data, ``Data.fingerprint``.
        settings: what the task adds to the configuration, ``Task.settings``.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: Scheduler
    scaler: torch.amp.GradScaler
    loss: ExactMean
    epoch: int = 0
    step: int = 0
    best_score: float = -math.inf
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def create(
        cls, model: nn.Module, config: Config, *, device: torch.device, amp_dtype: torch.dtype
    ) -> TrainState:
        """Prepare the training of a model that is on the device; an InputError where it cannot."""
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
        return float(self.optimizer.param_groups[0]["lr"])

    def finish_epoch(self, score: float) -> None:
        """Go on to the next epoch; a plateau schedule looks at the score."""
        self.schedule.step(self.epoch, score)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss = ExactMean(self.loss.device)

    def to_checkpoint(self, config: Config) -> dict[str, Any]:
        """Describe the state in tensors and plain values; every rank must ask.

        The keys are those of released training files, ``config`` for ``args``, and ours. ``epoch``
        is the last finished one, -1 before that; ``step`` counts in the next.
        """
        optimizer = self.optimizer.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "optimizer_names": parameter_names(self),
            "num_optimizer_states": len(optimizer["state"]),
            "lr_scheduler": schedule_state(self.schedule),
            "epoch": self.epoch - 1,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "loss_sums": self.loss.sums(),
            "best_score": self.best_score,
            "config": describe_settings(config) | dict(self.settings),
            "world_size": world_size(),
            "data": dict(self.data),
            "versions": describe_versions(self.loss.device),
        }


def describe_versions(device: torch.device) -> dict[str, str]:
    """Name what the last bits of a run's results depend on beside its settings."""
    import timm

    return {
        "ecoformer": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention backend": default_backend(device).name,
    }


def parameter_names(state: TrainState) -> list[str]:
    """Name the parameters in the order in which the optimiser numbers them."""
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return [names[p] for group in state.optimizer.param_groups for p in group["params"]]


def describe_settings(config: Config) -> dict[str, Any]:
    """The flat configuration, with the mode that follows from ``--finetune`` written out."""
    return config.to_flat() | {"train_mode": config.run.is_train_mode}
