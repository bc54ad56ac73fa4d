"""Where a run begins: fresh, from an earlier stage's weights, or exactly where it was stopped."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import nn

from ecoformer.checkpoint import load_checkpoint, read_checkpoint
from ecoformer.config import Config, describe_changes
from ecoformer.engine.digests import require_same_on_all
from ecoformer.engine.optim import schedule_state
from ecoformer.engine.progress import Progress
from ecoformer.engine.session import Session
from ecoformer.engine.sources import fetch, find_source
from ecoformer.engine.state import TrainState, describe_settings, describe_versions
from ecoformer.errors import InputError
from ecoformer.ranks import rank, run_on_all, world_size

# Settings that may differ when a run goes on: where things are and how they are computed, not
# what is computed.
FREE_FIELDS = {
    "allow_missing",
    "allow_resume_change",
    "checkpoint_every",
    "compile",
    "compile_mode",
    "config",
    "data_path",
    "deterministic",
    "device",
    "dist_timeout",
    "eval",
    "finetune",
    "max_bad_images",
    "num_workers",
    "output_dir",
    "pin_mem",
    "resume",
    "start_epoch",
    # What is in it is compared, in place of where it lies.
    "teacher",
    "throughput",
    "train_msa",
}
# Settings with a permission of their own; that of the rest is "config".
_PERMISSIONS = {"batch_size": "batch-size", "world_size": "world-size"}

_logger = logging.getLogger(__name__)


def start_state(session: Session, model: nn.Module) -> TrainState:
    """Build what training changes, where this run begins or goes on, around a fresh model.

    Raises:
        InputError: a checkpoint cannot be used, ranks begin with different ones or different
            data, or there is no such optimiser or schedule.
    """
    config, data = session.config, session.data
    assert data.train is not None
    state = TrainState.create(model, config, device=session.device, amp_dtype=session.amp_dtype)
    state.data = data.fingerprint
    state.settings = session.task.settings()
    _require_same_data(state.data, config)
    source = find_source(config)
    if source is not None:
        path = fetch(source)
        run_on_all(lambda: restore(state, read_checkpoint(path), config, origin=source))
        _require_same_start(state, source)
        _keep_inside_epoch(state, len(data.train), config, origin=source)
        _logger.info("%s: going on at epoch %d, step %d", source, state.epoch, state.step)
        if state.epoch >= config.optim.epochs:
            _logger.info("nothing is left to do of %d epochs", config.optim.epochs)
        return state
    if config.run.finetune:
        weights = fetch(config.run.finetune)
        report = session.task.start_from(model, weights, allow_missing=config.run.allow_missing)
        _logger.info("%s", report)
    if config.run.start_epoch >= config.optim.epochs > 0:
        raise InputError(
            f"--start_epoch {config.run.start_epoch} leaves none of {config.optim.epochs} epochs "
            "to train; give a smaller one, or more --epochs."
        )
    if config.run.start_epoch:
        state.epoch = config.run.start_epoch
        state.schedule.step(state.epoch - 1)
    return state


def load_for_evaluation(model: nn.Module, config: Config) -> None:
    """Load the weights that ``--resume`` names, or the folder's; the same on all ranks.

    Raises:
        InputError: there are none, they are of another model, or they differ between ranks.
    """
    source = find_source(config)
    if source is None:
        raise InputError(
            f"--eval needs weights, and {config.run.output_dir} holds no checkpoint; give "
            "--resume FILE, URL or zoo name."
        )
    path = fetch(source)
    report = run_on_all(lambda: load_checkpoint(model, path, strict=True))[rank()]
    _logger.info("%s", report)
    require_same_on_all(
        model.state_dict(),
        f"{source} holds other weights",
        f"put {source} on a disk that all hosts share, or copy one file to all",
    )


def restore(state: TrainState, checkpoint: Mapping[str, Any], config: Config, origin: str) -> None:
    """Go on where a checkpoint, which messages call ``origin``, was written.

    A released one knows neither its best score nor its configuration in a form to compare.

    Raises:
        InputError: it holds weights only, it belongs to another model or optimiser, or the run
            was another one; nothing of the state has changed then.
    """
    if not {"optimizer", "lr_scheduler", "epoch"} <= checkpoint.keys():
        raise InputError(
            f"{origin}: holds weights only, from which no run can go on; use --finetune to "
            "start from them, or --eval to measure them."
        )
    # On a copy: what does not fit is to be found before anything is taken.
    model = deepcopy(state.model)
    try:
        if "config" in checkpoint:
            _require_same_run(checkpoint, state, config, origin)
        load_checkpoint(model, checkpoint["model"], strict=True, origin=origin)
        progress = Progress.read(checkpoint, state, config)
        # No setting tells these, and an uninterrupted run would have other last bits.
        saved = checkpoint.get("versions", {})
        changes = [
            f"{name} {saved[name]}, here {value}"
            for name, value in describe_versions(state.loss.device).items()
            if saved.get(name, value) != value
        ]
    except InputError:
        raise
    # What a damaged or foreign file holds in the place of numbers.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise InputError(
            f"{origin}: its training state does not fit this run ({e!r}); use --finetune "
            "to start from its weights."
        ) from e
    state.model.load_state_dict(model.state_dict())
    progress.apply(state)
    for note in getattr(checkpoint, "notes", ()):
        _logger.info("%s: %s.", origin, note)
    if not checkpoint.get("data"):
        _logger.info("%s: does not say what data it was trained on, so they go unchecked", origin)
    if state.scaler.is_enabled() and not checkpoint.get("scaler"):
        _logger.info("%s: holds no gradient scale; it begins at that of a new run", origin)
    saved_groups, groups = checkpoint["optimizer"]["param_groups"], state.optimizer.param_groups
    if groups[0].get("fused") and not saved_groups[0].get("fused"):
        _logger.info("%s: the optimizer now steps in one kernel, which rounds otherwise", origin)
    if "config" in checkpoint:
        _convert_step(state, checkpoint, config, origin)
    if changes:
        _logger.warning(
            "%s: was written with %s; the run goes on, and rounds otherwise than one that was "
            "never stopped",
            origin,
            "; ".join(changes),
        )


def _convert_step(
    state: TrainState, checkpoint: Mapping[str, Any], config: Config, origin: str
) -> None:
    """Find the place in an epoch by its images, where steps have another number of them."""
    before = checkpoint["config"]["batch_size"] * checkpoint["world_size"]
    now = config.data.batch_size * world_size()
    if before == now or not state.step:
        return
    saved, num_done = state.step, state.step * before
    state.step = num_done // now
    # Only between two updates: no gradients wait for more batches.
    state.step -= state.step % config.optim.grad_accum_steps
    _logger.info(
        "%s: step %d, of %d samples each, is step %d of %d; %d samples come again in this epoch",
        *(origin, saved, before, state.step, now, num_done - state.step * now),
    )


def _keep_inside_epoch(state: TrainState, num_steps: int, config: Config, origin: str) -> None:
    """An epoch that has become shorter ends where it would go on."""
    if state.step <= num_steps:
        return
    if not set(config.run.allow_resume_change) - {"config"}:
        raise InputError(
            f"{origin}: stands at step {state.step} of an epoch, which has {num_steps} here; "
            "repeat that run's data, allow the change with --allow-resume-change data, or start "
            "anew with --resume none."
        )
    _logger.info("%s: epoch %d is over, after %d steps", origin, state.epoch, state.step)
    state.step = num_steps


def _require_same_run(
    checkpoint: Mapping[str, Any], state: TrainState, config: Config, origin: str
) -> None:
    saved = {**checkpoint["config"], "world_size": checkpoint["world_size"]}
    present = {**describe_settings(config), **state.settings, "world_size": world_size()}
    changes = {
        name: (_PERMISSIONS.get(name, "config"), f"{name} {change}")
        for name, change in describe_changes(saved, present).items()
        if name not in FREE_FIELDS
    }
    # Earlier files, and tasks that cannot tell, have none.
    if checkpoint.get("data") and state.data:
        for part, change in _describe_data(checkpoint["data"], state.data).items():
            changes[f"{part} data"] = "data", f"{part} data {change}"
    refused: dict[str, list[str]] = {}
    for permission, change in changes.values():
        if permission not in config.run.allow_resume_change:
            refused.setdefault(permission, []).append(change)
    if refused:
        told = "; ".join(change for group in refused.values() for change in group)
        raise InputError(
            f"{origin}: belongs to a run with other settings ({told}); repeat that run's "
            f"settings, allow the change with --allow-resume-change {' '.join(refused)}, or "
            "start anew with --resume none."
        )


def _describe_data(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """The parts of the data that differ, and how; both name a value of each by its meaning."""
    return {
        part: f"{_tell_data(old.get(part))} -> {_tell_data(new.get(part))}"
        for part in {**old, **new}
        if old.get(part) != new.get(part)
    }


def _tell_data(fingerprint: Any) -> str:
    if not isinstance(fingerprint, Mapping):
        return repr(fingerprint)
    return " ".join(f"{name}={value}" for name, value in fingerprint.items())


def _require_same_data(fingerprint: Mapping[str, Any], config: Config) -> None:
    require_same_on_all(
        fingerprint,
        f"--data-path {config.data.data_path} holds other data",
        "give all hosts the same files",
    )


def _require_same_start(state: TrainState, source: str) -> None:
    summary = {
        "place": (state.epoch, state.step, state.best_score),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "schedule": schedule_state(state.schedule),
    }
    require_same_on_all(
        summary,
        f"{source} is another checkpoint",
        f"put {source} on a disk that all hosts share, or copy one file to all",
        label=f"epoch {state.epoch}, step {state.step}",
    )
