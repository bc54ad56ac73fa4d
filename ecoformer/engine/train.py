"""The training loop, from the first epoch to the last."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from multiprocessing import active_children
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ecoformer.config.schema import RunConfig
from ecoformer.data.workers import end_workers
from ecoformer.engine.compiling import compile_model
from ecoformer.engine.evaluate import measure
from ecoformer.engine.folder import RunFolder
from ecoformer.engine.health import Health, report_non_finite
from ecoformer.engine.logs import RunLog, format_seconds, track
from ecoformer.engine.optim import scale_learning_rate
from ecoformer.engine.saving import Saver
from ecoformer.engine.session import Session
from ecoformer.engine.signals import Request, agree, leave_at_signal, stop_signals
from ecoformer.engine.state import TrainState
from ecoformer.errors import NonFiniteError, Preempted
from ecoformer.hashing import find_statistics, fit_hash_functions, hash_layers
from ecoformer.ranks import broadcast_tensors, is_main, rank, run_on_main, world_size
from ecoformer.seeding import derive_seed, seed_everything

_logger = logging.getLogger(__name__)


def train_model(session: Session, state: TrainState, folder: RunFolder) -> None:
    """Train the epochs that are left; after each, evaluate, log and save.

    Raises:
        InputError: the data, the disk at the last save, or the folder has gone.
        NonFiniteError: a loss, gradient, weight or hash function; all ranks raise at one step.
        Preempted: a signal asked for it, and the state is saved.
    """
    config, num_epochs = session.config, session.config.optim.epochs
    network, parallel = build_networks(state.model, config.run, session.device)
    num_parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    _log_start(session, num_parameters)

    began, first_epoch, children = time.monotonic(), state.epoch, active_children()
    with (
        RunLog(folder, first_epoch=first_epoch) as log,
        stop_signals(),
        Saver(state, config, folder) as saver,
        report_non_finite(session, state),
    ):
        try:
            while state.epoch < num_epochs:
                train_epoch(session, state, parallel, saver)
                metrics = measure(session, network)
                is_best = metrics.score > state.best_score
                if is_best:
                    state.best_score = metrics.score
                record = {
                    "train_lr": state.learning_rate,
                    "train_loss": state.loss.mean(),
                    **metrics.values,
                    "epoch": state.epoch,
                    "n_parameters": num_parameters,
                }
                state.finish_epoch(metrics.score)
                is_last = state.epoch == num_epochs
                # Before the checkpoint: a run that dies between them writes this line again.
                log.write(record, is_last=is_last)
                saver.save(is_best=is_best, is_last=is_last)
                num_done = state.epoch - first_epoch
                left = (time.monotonic() - began) / num_done * (num_epochs - state.epoch)
                _logger.info(
                    "epoch %d, %d of %d done: train loss %.4f, %s, best %s, %s left",
                    record["epoch"],
                    state.epoch,
                    num_epochs,
                    record["train_loss"],
                    metrics,
                    metrics.format_score(state.best_score),
                    format_seconds(left),
                )
        except Preempted as stop:
            saver.save(is_last=True)
            end_workers(spared=children)
            where = f"epoch {state.epoch}, step {state.step}"
            raise Preempted(f"{stop}, saved at {where}; the same command goes on.") from None


def train_epoch(session: Session, state: TrainState, network: nn.Module, saver: Saver) -> None:
    """Train ``state.epoch``, or what is left of it, counting its losses in ``state.loss``.

    A step draws from generators that are seeded by where it stands, so a resumed epoch draws
    what an uninterrupted one does. ``network`` is the model, compiled or parallel or both.

    Raises:
        NonFiniteError: a loss or gradient is not finite; all ranks raise at the same step.
        Preempted: a signal asked for it; all ranks raise with the same steps done.
    """
    config, task, loader = session.config, session.task, session.data.train
    assert loader is not None
    epoch, seed, num_steps = state.epoch, config.run.seed, len(loader)
    num_accumulated = config.optim.grad_accum_steps
    statistics = find_statistics(state.model)
    is_fit_due = epoch % config.optim.refit_every_epochs == 0 and bool(hash_layers(state.model))
    network.train(config.run.is_train_mode)
    compute = session.compute(network)
    health = Health(state, session.device)
    loader.set_epoch(epoch, start_step=state.step)
    batches = iter(loader)
    steps = range(state.step, num_steps)
    for step in track(
        steps, f"epoch {epoch}", total=num_steps, start=state.step, note=lambda: str(health)
    ):
        # Stop or save, where all ranks agree, but never with gradients that wait for more batches:
        # no checkpoint holds them.
        group_start = step - step % num_accumulated
        if step > group_start:
            batch = next(batches)
        else:
            batch = leave_at_signal(lambda: next(batches))
            request = agree(is_save_due=saver.is_due, is_failed=health.is_bad)
            if request is not Request.NONE:
                health.finish()
            if request is Request.STOP:
                raise Preempted("stopped between two steps")
            if request is Request.SAVE:
                saver.save()

        seed_everything(derive_seed("step", seed, epoch, step, rank()))
        batch = task.prepare(session.move(batch))
        if is_fit_due and step == 0:
            _refit(state.model, task.fit_inputs(batch), seed=derive_seed("fit", seed, epoch))

        # The last step of an epoch updates, whether its group of batches is full or not.
        group_end = min(group_start + num_accumulated, num_steps)
        is_update = step + 1 == group_end
        with nullcontext() if is_update else _without_sync(network):
            loss = task.loss(compute, batch)
            state.scaler.scale(loss / (group_end - group_start)).backward()
        norm = loss
        if is_update:
            norm = update_weights(state, config.optim.clip_grad)
            # Each rank moved them by batches of its own, and a checkpoint holds rank 0's.
            broadcast_tensors([module.get_buffer(name) for module, name in statistics])
        state.loss.add(loss)
        state.step = step + 1
        health.check(loss, norm)
    health.finish()


def update_weights(state: TrainState, clip_grad: float | None) -> Tensor:
    """Move the weights and forget the gradients; returns their norm before clipping, []."""
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_grad is not None:
        clip_grads_with_norm_(parameters, clip_grad, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return norm


def build_networks(
    model: nn.Module, run: RunConfig, device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """Give what is evaluated and what is trained; alone, they are one."""
    parallel = parallelize(model, device)
    if not run.compile:
        return model, parallel
    network = compile_model(model, run.compile_mode)
    if parallel is model:
        return network, network
    # Compiled around what joins the ranks, a model is cut where buckets end: the gradients of one
    # are summed while those of the next are computed. Within it, all would come at the end.
    return network, compile_model(parallel, run.compile_mode)


def parallelize(model: nn.Module, device: torch.device) -> nn.Module:
    """Average the gradients of all ranks; their parameters and buffers become rank 0's.

    Alone, a model stays what it is.
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
    # Hash functions are broadcast after a fit, others after each update: the next forward would be
    # too late for an evaluation. The argument of this name is on its way out, the attribute is not.
    parallel.broadcast_buffers = False
    _settle_buckets(parallel, model)
    return parallel


class _Touch(nn.Module):
    """Has a gradient in each parameter, with no input and no random number."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._touched = parameters

    def forward(self) -> Tensor:
        # In turn, as layers are: backward comes to them in the opposite order.
        total = torch.zeros((), device=self._touched[0].device)
        for parameter in self._touched:
            total = total + parameter.flatten()[:1].sum()
        return total


def _settle_buckets(parallel: DistributedDataParallel, model: nn.Module) -> None:
    """Let a process sum gradients over ranks in its first step as in all others.

    After a process's first backward, DistributedDataParallel sorts its buckets anew by when
    gradients came, and with them the order in which three ranks and more are summed. A run that
    goes on would differ from one that was never stopped, were that backward one of the model.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parallel.module = _Touch(trained)
    parallel().backward()
    parallel.module = model
    for parameter in trained:
        parameter.grad = None


def _without_sync(network: nn.Module) -> AbstractContextManager[None]:
    parallel = getattr(network, "_orig_mod", network)
    return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) else nullcontext()


def _refit(model: nn.Module, inputs: Any, *, seed: int) -> None:
    """Fit on rank 0's batch, in the mode that the model is in, and share the outcome."""
    began = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    before = {layer: deepcopy(layer.state_dict()) for layer in hash_layers(model).values()}
    try:
        run_on_main(lambda: leave_at_signal(lambda: fit_hash_functions(model, inputs, generator)))
    except NonFiniteError as error:
        # The inputs are those of the step to come.
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
    """Give every rank the hash functions of rank 0; the bare model is alike on all."""
    layers = hash_layers(model).values()
    broadcast_tensors([buffer for layer in layers for buffer in layer.buffers()])
    for layer in layers:
        layer.refresh_fitted()


def _log_start(session: Session, num_parameters: int) -> None:
    """What is about to run, in three lines: most surprises show here, before an epoch is spent."""
    config, data, samples = session.config, session.data, session.task.samples
    assert data.train is not None
    dtype, device = str(session.amp_dtype).removeprefix("torch."), session.device.type
    parts = (
        f"{config.model.model}/{config.model.attn_type}",
        f"{num_parameters / 1e6:.2f} M parameters",
        session.task.describe_inputs(),
        f"{dtype} on {world_size()} x {device}",
        f"{'train' if config.run.is_train_mode else 'eval'} mode",
        f"into {session.folder}",
    )
    _logger.info("%s", ", ".join(filter(None, parts)))
    batch_size = config.data.batch_size
    peak_lr = scale_learning_rate(config.optim, batch_size=batch_size, world_size=world_size())
    plan = (
        f"{config.optim.epochs} epochs of {len(data.train)} steps of {batch_size * world_size()} "
        f"{samples}, peak learning rate {peak_lr:.3g}"
    )
    _logger.info("%s", "; ".join(filter(None, (data.summary, plan))))
    if is_main() and config.optim.warmup_epochs >= config.optim.epochs:
        _logger.warning(
            "all %d epochs are warm-up (--warmup-epochs %d), so the peak is never reached",
            config.optim.epochs,
            config.optim.warmup_epochs,
        )
