"""Where a run begins: fresh, from an earlier stage's weights, or exactly where it was stopped."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ecoformer.checkpoint import load_checkpoint, read_checkpoint
from ecoformer.config import Config, describe_changes
from ecoformer.engine.optim import restore_schedule
from ecoformer.engine.session import Session
from ecoformer.engine.sources import fetch, find_source
from ecoformer.engine.state import TrainState, describe_settings
from ecoformer.errors import InputError
from ecoformer.ranks import world_size
from ecoformer.sums import ExactMean

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

_logger = logging.getLogger(__name__)


def start_state(session: Session, model: nn.Module) -> TrainState:
    """Build what training changes, where this run begins or goes on, around a fresh model.

    Raises:
        InputError: a checkpoint cannot be used, or there is no such optimiser or schedule.
    """
    config = session.config
    state = TrainState.create(model, config, device=session.device, amp_dtype=session.amp_dtype)
    source = find_source(config)
    if source is not None:
        restore(state, read_checkpoint(fetch(source)), config, origin=source)
        _logger.info("%s: going on at epoch %d, step %d", source, state.epoch, state.step)
        if state.epoch >= config.optim.epochs:
            _logger.info("nothing is left to do of %d epochs", config.optim.epochs)
        return state
    if config.run.finetune:
        weights = fetch(config.run.finetune)
        report = load_checkpoint(model, weights, allow_missing=config.run.allow_missing)
        _logger.info("%s", report)
    if config.run.start_epoch:
        state.epoch = config.run.start_epoch
        state.schedule.step(state.epoch - 1)
    return state


def load_for_evaluation(model: nn.Module, config: Config) -> None:
    """Load the weights that ``--resume`` names, or the folder's.

    Raises:
        InputError: there are none, or they are of another model.
    """
    source = find_source(config)
    if source is None:
        raise InputError(
            f"--eval needs weights, and {config.run.output_dir} holds no checkpoint; give "
            "--resume FILE, URL or zoo name."
        )
    _logger.info("%s", load_checkpoint(model, fetch(source), strict=True))


def restore(state: TrainState, checkpoint: Mapping[str, Any], config: Config, origin: str) -> None:
    """Go on where a checkpoint, which messages call ``origin``, was written.

    A released one knows neither its best score nor its configuration in a form to compare.

    Raises:
        InputError: it holds weights only, it belongs to another model or optimiser, or the run
            was another one.
    """
    if not {"optimizer", "lr_scheduler", "epoch"} <= checkpoint.keys():
        raise InputError(
            f"{origin}: holds weights only, from which no run can go on; use --finetune to "
            "start from them, or --eval to measure them."
        )
    try:
        _take(state, checkpoint, config, origin)
    except InputError:
        raise
    # What a damaged or foreign file holds in the place of numbers.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{origin}: its training state does not fit this run ({error!r}); use --finetune "
            "to start from its weights."
        ) from error


def _take(state: TrainState, checkpoint: Mapping[str, Any], config: Config, origin: str) -> None:
    if "config" in checkpoint:
        _require_same_run(checkpoint, config, origin)
    load_checkpoint(state.model, checkpoint["model"], strict=True, origin=origin)
    _load_optimizer(state.optimizer, checkpoint["optimizer"])
    if checkpoint.get("scaler"):
        state.scaler.load_state_dict(checkpoint["scaler"])
    last_epoch = int(checkpoint["epoch"])
    restore_schedule(state.schedule, checkpoint["lr_scheduler"], last_epoch=last_epoch)
    state.epoch, state.step = last_epoch + 1, int(checkpoint.get("step", 0))
    state.loss = ExactMean(state.loss.device, checkpoint.get("loss_sums", (0, 0, 0)))
    # Earlier files knew accuracies only.
    best = checkpoint.get("best_score", checkpoint.get("best_acc1", state.best_score))
    state.best_score = float(best)


def _require_same_run(checkpoint: Mapping[str, Any], config: Config, origin: str) -> None:
    saved = {**checkpoint["config"], "world_size": checkpoint["world_size"]}
    present = {**describe_settings(config), "world_size": world_size()}
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
