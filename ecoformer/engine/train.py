"""One epoch of training."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ecoformer.config import Config
from ecoformer.engine.logs import format_seconds, track
from ecoformer.engine.precision import autocast
from ecoformer.engine.signals import Request, agree, leave_at_signal
from ecoformer.engine.state import TrainState
from ecoformer.errors import NonFiniteError, Preempted
from ecoformer.hashing import fit_hash_functions, hash_layers
from ecoformer.ranks import max_over_ranks, rank, run_on_main, world_size
from ecoformer.seeding import derive_seed, seed_everything

if TYPE_CHECKING:
    from ecoformer.data import Loader, Loaders

# Below this scale a gradient of one vanishes in float16: what overflows is not the scale's doing.
_SMALLEST_SCALE = 2.0**-24

_logger = logging.getLogger(__name__)


def parallelize(model: nn.Module, device: torch.device) -> nn.Module:
    """Make the gradients of all ranks one. Alone, a model stays what it is.

    Args:
        model: the model, compiled or not; its parameters and buffers become rank 0's.
        device: where it is.

    Returns:
        What to call in training, in place of the model.
    """
    if world_size() == 1:
        return model
    # Of depthwise convolutions, whose gradients have an axis of length one: nothing is slower.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    parallel = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    # Hash functions change at a fit only, and are broadcast there. The argument of this name is
    # on its way out, the attribute is not.
    parallel.broadcast_buffers = False
    return parallel


def train_epoch(
    state: TrainState,
    network: nn.Module,
    loaders: Loaders,
    config: Config,
    *,
    device: torch.device,
    amp_dtype: torch.dtype,
    save: Callable[[], None] | None = None,
) -> None:
    """Train ``state.epoch``, or what is left of it, counting its losses in ``state.loss``.

    A step draws from generators that are seeded by where it stands, so a resumed epoch draws
    what an uninterrupted one does.

    Args:
        state: what is trained, and how far it is.
        network: ``state.model`` as it is called for a step: compiled, on many ranks.
        loaders: training batches and mixup.
        config: of the run.
        device: where the model is.
        amp_dtype: from ``choose_amp_dtype``.
        save: writes the state; called every ``config.run.checkpoint_every`` minutes.

    Raises:
        NonFiniteError: a loss or gradient is not finite; all ranks raise at the same step.
        Preempted: a signal asked for it; all ranks raise with the same steps done.
    """
    optim, epoch, seed = config.optim, state.epoch, config.run.seed
    is_fit_due = epoch % config.optim.refit_every_epochs == 0 and bool(hash_layers(state.model))
    network.train(config.run.is_train_mode)
    assert loaders.train is not None
    loaders.train.set_epoch(epoch, start_step=state.step)
    num_steps = len(loaders.train)
    health = _Health(state, device)
    batches = track(
        _until_stopped(loaders.train, state, health, config, save),
        f"epoch {epoch}",
        total=num_steps,
        start=state.step,
        note=lambda: str(health),
    )
    for step, (images, targets) in enumerate(batches, start=state.step):
        seed_everything(derive_seed("step", seed, epoch, step, rank()))
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        if loaders.mixup is not None:
            images, targets = loaders.mixup(images, targets)
        if is_fit_due and step == 0:
            _refit(state.model, images, seed=derive_seed("fit", seed, epoch))

        # The last step of an epoch updates, whether its group of batches is full or not.
        group_start = step - step % optim.grad_accum_steps
        group_end = min(group_start + optim.grad_accum_steps, num_steps)
        is_update = step + 1 == group_end
        with nullcontext() if is_update else _without_sync(network):
            with autocast(device, amp_dtype):
                logits = network(images)
            loss = _cross_entropy(logits.float(), targets, config.augment.smoothing)
            state.scaler.scale(loss / (group_end - group_start)).backward()
        norm = _update(state, optim.clip_grad) if is_update else loss
        state.loss.add(loss)
        state.step = step + 1
        health.check(loss, norm)
    health.finish()
    if state.step < num_steps:
        raise Preempted("stopped between two steps")


def _until_stopped(
    loader: Loader,
    state: TrainState,
    health: _Health,
    config: Config,
    save: Callable[[], None] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch, until all ranks agree to stop; between some, the state is saved."""
    batches, last_save = iter(loader), time.monotonic()
    seconds_between_saves = 60 * config.run.checkpoint_every
    for step in range(state.step, len(loader)):
        # No checkpoint holds gradients that wait for more batches.
        if step % config.optim.grad_accum_steps:
            yield next(batches)
            continue
        batch = leave_at_signal(lambda: next(batches))
        is_save_due = 0 < seconds_between_saves <= time.monotonic() - last_save
        request = agree(is_save_due=is_save_due)
        if request is Request.STOP:
            return
        if request is Request.SAVE and save is not None:
            health.finish()
            save()
            last_save = time.monotonic()
        assert batch is not None
        yield batch


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mixed targets [B, classes] are smoothed already; labels [B] are not."""
    is_mixed = targets.is_floating_point()
    return F.cross_entropy(logits, targets, label_smoothing=0.0 if is_mixed else smoothing)


def _without_sync(network: nn.Module) -> AbstractContextManager[None]:
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def _update(state: TrainState, clip_grad: float | None) -> Tensor:
    """Move the weights; returns the gradient's norm before clipping."""
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_grad is not None:
        clip_grads_with_norm_(parameters, clip_grad, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return norm


def _refit(model: nn.Module, images: Tensor, *, seed: int) -> None:
    """Fit on rank 0's batch, in the mode that the model is in, and share the outcome."""
    began = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    before = {layer: deepcopy(layer.state_dict()) for layer in hash_layers(model).values()}
    try:
        run_on_main(lambda: leave_at_signal(lambda: fit_hash_functions(model, images, generator)))
    except NonFiniteError as error:
        # The images are those of the step to come.
        error.step = 0
        raise
    if agree() is Request.STOP:
        for layer, functions in before.items():
            layer.load_state_dict(functions)
        raise Preempted("stopped in a fit")
    broadcast_hash_functions(model)
    took = format_seconds(time.monotonic() - began)
    _logger.info("fitted the hash functions of %d layers in %s", len(before), took)


def broadcast_hash_functions(model: nn.Module) -> None:
    """Give every rank the hash functions of rank 0.

    Args:
        model: the bare model, the same on every rank.
    """
    if not torch.distributed.is_initialized():
        return
    for layer in hash_layers(model).values():
        for buffer in layer.buffers():
            torch.distributed.broadcast(buffer, src=0)
        layer.refresh_fitted()


class _Health:
    """Stops all ranks at one step when a loss or gradient is not finite.

    The outcome of a step is read after the next one has been queued, so the device never waits
    for the host. Nothing is saved before ``finish``.
    """

    def __init__(self, state: TrainState, device: torch.device) -> None:
        self._loss = math.nan
        self._state = state
        self._is_cuda = device.type == "cuda"
        self._pending: tuple[Tensor, torch.cuda.Event | None, int] | None = None

    def __str__(self) -> str:
        if math.isnan(self._loss):
            return ""
        return f"loss {self._loss:.4f} lr {self._state.learning_rate:.3g}"

    def check(self, loss: Tensor, norm: Tensor) -> None:
        """Queue this step's outcome, and look at the one before."""
        state, loss = self._state, loss.detach()
        is_bad = ~loss.isfinite()
        if not state.scaler.is_enabled():
            # With a scaler, a gradient that overflows only lowers the scale.
            is_bad |= ~norm.isfinite()
        is_bad = max_over_ranks(is_bad.to(loss.dtype))
        scale = state.scaler.scale(torch.ones_like(loss))
        outcome = torch.stack([loss, is_bad, scale])
        self.finish()
        outcome = outcome.to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event() if self._is_cuda else None
        self._pending = outcome, event, state.step - 1

    def finish(self) -> None:
        """Look at the last outcome that is queued."""
        if self._pending is None:
            return
        outcome, event, step = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        self._loss, is_bad, scale = outcome.tolist()
        if is_bad or scale < _SMALLEST_SCALE:
            raise NonFiniteError(
                f"the loss or a gradient is not finite at epoch {self._state.epoch}, step {step}, "
                f"learning rate {self._state.learning_rate:g}, loss scale {scale:g}; the last "
                "checkpoint is untouched. Try a lower --lr, --clip-grad, or --amp-dtype bfloat16.",
                step=step,
                loss_scale=scale,
            )
