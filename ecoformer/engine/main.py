"""The run's story: configuration, ranks, data, model, weights, training, evaluation."""

from __future__ import annotations

import io
import json
import logging
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ecoformer.checkpoint import load_checkpoint, read_checkpoint, resolve_source
from ecoformer.config import Config, parse_config, to_yaml
from ecoformer.engine.background import BackgroundWriter
from ecoformer.engine.compiling import compile_model
from ecoformer.engine.evaluate import evaluate
from ecoformer.engine.launch import claim_error, has_failed_elsewhere, process_group
from ecoformer.engine.logs import RunLog, format_seconds, print_log
from ecoformer.engine.optim import scale_learning_rate
from ecoformer.engine.precision import choose_amp_dtype
from ecoformer.engine.signals import stop_signals
from ecoformer.engine.state import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    TrainState,
    save_checkpoint,
)
from ecoformer.engine.throughput import NUM_BATCHES, measure_throughput
from ecoformer.engine.train import parallelize, train_epoch
from ecoformer.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    InputError,
    NonFiniteError,
    Preempted,
    print_error,
)
from ecoformer.files import write_text
from ecoformer.models.registry import ModelFamily
from ecoformer.ranks import (
    broadcast_object,
    download_on_main,
    gather_objects,
    is_main,
    rank,
    run_on_main,
    world_size,
)
from ecoformer.seeding import derive_seed, seed_everything

if TYPE_CHECKING:
    from ecoformer.data import Loaders

NON_FINITE_REPORT = "non_finite.json"

# More than closes an archive without a comment, which is how checkpoints are.
_NUM_END_BYTES = 1024

_logger = logging.getLogger(__name__)


def run_main(family: ModelFamily, argv: Sequence[str] | None = None) -> int:
    """Train, evaluate or time a model of a family, as its command line says.

    Args:
        family: the backbone.
        argv: the words after the program's name; ``sys.argv`` if not given.

    Returns:
        The process's exit code: 0 done, 1 another rank failed and says why, 2 bad input,
        3 non-finite, 75 preempted and saved, 130 interrupted.
    """
    try:
        config = parse_config(argv, family)
        with process_group(config.run.device) as device, print_log():
            _run(family, config, device)
    except (InputError, NonFiniteError, Preempted) as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted; what was saved is untouched.")
        return EXIT_INTERRUPTED
    except RuntimeError:
        if not has_failed_elsewhere():
            raise
        return EXIT_FAILED
    return EXIT_DONE


def _print_error(message: object) -> None:
    if claim_error():
        print_error(message)


def _run(family: ModelFamily, config: Config, device: torch.device) -> None:
    if config.run.throughput:
        _time(family, config, device)
        return
    # Brings timm along, which takes seconds: whoever mistyped a flag need not wait for it.
    from ecoformer.data import build_loaders

    loaders = build_loaders(
        config.data,
        config.augment,
        input_size=config.model.input_size,
        seed=config.run.seed,
        rank=rank(),
        world_size=world_size(),
        pin_memory=device.type == "cuda",
        train=not config.run.eval,
    )
    model = _create_model(family, config, device, num_classes=loaders.num_classes)
    amp_dtype = choose_amp_dtype(config.run.amp_dtype, device)
    if not config.run.eval:
        _train(model, loaders, config, device, amp_dtype)
        return
    _load_for_evaluation(model, config)
    network = compile_model(model) if config.run.compile else model
    result = evaluate(network, loaders.eval, device=device, amp_dtype=amp_dtype)
    _logger.info("%s", result)


def _train(
    model: nn.Module,
    loaders: Loaders,
    config: Config,
    device: torch.device,
    amp_dtype: torch.dtype,
) -> None:
    from ecoformer.data.workers import end_workers

    state = _start(model, config, device, amp_dtype)
    folder, num_epochs = Path(config.run.output_dir), config.optim.epochs
    run_on_main(lambda: write_text(folder / "config.yaml", to_yaml(config)))
    network = compile_model(model) if config.run.compile else model
    parallel = parallelize(network, device)
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _log_start(loaders, config, folder, device, amp_dtype, num_parameters)

    writer = BackgroundWriter()

    def save(*, is_best: bool = False, is_last: bool = False) -> None:
        save_checkpoint(state, config, folder, writer, is_best=is_best, is_last=is_last)

    began, first_epoch = time.monotonic(), state.epoch
    report = _report_non_finite(state, loaders, config, folder / NON_FINITE_REPORT)
    with RunLog(folder, first_epoch=first_epoch) as log, stop_signals(), writer, report:
        try:
            while state.epoch < num_epochs:
                train_epoch(
                    state,
                    parallel,
                    loaders,
                    config,
                    device=device,
                    amp_dtype=amp_dtype,
                    save=save,
                )
                result = evaluate(network, loaders.eval, device=device, amp_dtype=amp_dtype)
                is_best = result.acc1 > state.best_acc1
                state.best_acc1 = max(result.acc1, state.best_acc1)
                record = {
                    "train_lr": state.learning_rate,
                    "train_loss": state.loss.mean(),
                    "test_loss": result.loss,
                    "test_acc1": result.acc1,
                    "test_acc5": result.acc5,
                    "epoch": state.epoch,
                    "n_parameters": num_parameters,
                }
                state.finish_epoch(result.acc1)
                is_last = state.epoch == num_epochs
                # Before the checkpoint: a run that dies between them writes this line again.
                log.write(record, is_last=is_last)
                save(is_best=is_best, is_last=is_last)
                num_done = state.epoch - first_epoch
                left = (time.monotonic() - began) / num_done * (num_epochs - state.epoch)
                _logger.info(
                    "epoch %d, %d of %d done: train loss %.4f, %s, best top-1 %.2f %%, %s left",
                    record["epoch"],
                    state.epoch,
                    num_epochs,
                    record["train_loss"],
                    result,
                    state.best_acc1,
                    format_seconds(left),
                )
        except Preempted as stop:
            save(is_last=True)
            end_workers()
            where = f"epoch {state.epoch}, step {state.step}"
            raise Preempted(f"{stop}, saved at {where}; the same command goes on.") from None


def _log_start(
    loaders: Loaders,
    config: Config,
    folder: Path,
    device: torch.device,
    amp_dtype: torch.dtype,
    num_parameters: int,
) -> None:
    """What is about to run, in three lines: most surprises show here, before an epoch is spent."""
    assert loaders.train is not None
    model, data, optim = config.model, config.data, config.optim
    _logger.info(
        "%s/%s, %.2f M parameters, %d px, %s on %d x %s, %s mode, into %s",
        model.model,
        model.attn_type,
        num_parameters / 1e6,
        model.input_size,
        str(amp_dtype).removeprefix("torch."),
        world_size(),
        device.type,
        "train" if config.run.is_train_mode else "eval",
        folder,
    )
    peak_lr = scale_learning_rate(optim, batch_size=data.batch_size, world_size=world_size())
    _logger.info(
        "%s: %d training and %d validation images of %d classes; %d epochs of %d steps of %d "
        "images, peak learning rate %.3g",
        data.data_set,
        len(loaders.train.images),
        len(loaders.eval.images),
        loaders.num_classes,
        optim.epochs,
        len(loaders.train),
        data.batch_size * world_size(),
        peak_lr,
    )
    if optim.warmup_epochs >= optim.epochs:
        _logger.warning(
            "all %d epochs are warm-up (--warmup-epochs %d), so the peak is never reached",
            optim.epochs,
            optim.warmup_epochs,
        )


@contextmanager
def _report_non_finite(
    state: TrainState, loaders: Loaders, config: Config, path: Path
) -> Iterator[None]:
    """Write what it takes to repeat the step that failed in a block, on all ranks together."""
    try:
        yield
    except NonFiniteError as error:
        _write_report(error, state, loaders, config, path)
        raise


def _write_report(
    error: NonFiniteError, state: TrainState, loaders: Loaders, config: Config, path: Path
) -> None:
    assert loaders.train is not None
    epoch, step = state.epoch, error.step
    # Evaluations and saves find what the last step left, which may be that of the epoch before.
    if step is None:
        epoch = max(0, epoch - (state.step == 0))
        step = (state.step or len(loaders.train)) - 1
    loaders.train.set_epoch(epoch, start_step=step)
    draws = next(iter(loaders.train.batches))
    report = {
        "error": str(error),
        "epoch": epoch,
        "step": step,
        "learning_rate": state.learning_rate if epoch == state.epoch else None,
        "loss_scale": error.loss_scale or state.scaler.get_scale(),
        "seed": config.run.seed,
        # By rank: a step draws its augmentation, too, from seed, epoch, step and place in here.
        "image_indices": gather_objects([draw.image for draw in draws]),
    }
    if is_main():
        try:
            write_text(path, json.dumps(report, indent=1) + "\n")
            _logger.info("what it takes to repeat the step is in %s", path)
        except InputError as failure:
            _logger.warning("%s", failure)


def _start(
    model: nn.Module, config: Config, device: torch.device, amp_dtype: torch.dtype
) -> TrainState:
    """Everything that training changes, where this run begins or goes on."""
    state = TrainState.create(model, config, device=device, amp_dtype=amp_dtype)
    source = _find_source(config)
    if source is not None:
        state.restore(read_checkpoint(_fetch(source)), config, origin=source)
        _logger.info("%s: going on at epoch %d, step %d", source, state.epoch, state.step)
        if state.epoch >= config.optim.epochs:
            _logger.info("nothing is left to do of %d epochs", config.optim.epochs)
        return state
    if config.run.finetune:
        weights = _fetch(config.run.finetune)
        report = load_checkpoint(model, weights, allow_missing=config.run.allow_missing)
        _logger.info("%s", report)
    if config.run.start_epoch:
        state.epoch = config.run.start_epoch
        state.schedule.step(state.epoch - 1)
    return state


def _load_for_evaluation(model: nn.Module, config: Config) -> None:
    source = _find_source(config)
    if source is None:
        raise InputError(
            f"--eval needs weights, and {config.run.output_dir} holds no checkpoint; give "
            "--resume FILE, URL or zoo name."
        )
    _logger.info("%s", load_checkpoint(model, _fetch(source), strict=True))


def _fetch(source: str) -> Path:
    """The file of a path, URL or zoo name, which one rank downloads for all that share a disk."""
    paths: list[Path] = []
    download_on_main(lambda: paths.append(resolve_source(source)))
    if paths:
        return paths[0]
    # What there is to say of it, rank 0 has said.
    logging.disable(logging.WARNING)
    try:
        return resolve_source(source)
    finally:
        logging.disable(logging.NOTSET)


def _time(family: ModelFamily, config: Config, device: torch.device) -> None:
    assert config.run.throughput is not None
    # Not training's default: the released protocol has no mixed precision.
    amp_dtype = choose_amp_dtype(config.run.amp_dtype or "none", device)
    _logger.info("timing %d batches of %d images", NUM_BATCHES, config.data.batch_size)
    result = measure_throughput(
        _create_model(family, config, device),
        protocol=config.run.throughput,
        batch_size=config.data.batch_size,
        input_size=config.model.input_size,
        device=device,
        amp_dtype=amp_dtype,
        is_compiled=config.run.compile,
    )
    _logger.info(
        "%s/%s, batch %d of %d px, %s on %s: %s",
        config.model.model,
        config.model.attn_type,
        config.data.batch_size,
        config.model.input_size,
        str(amp_dtype).removeprefix("torch."),
        device,
        result,
    )


def _create_model(
    family: ModelFamily, config: Config, device: torch.device, num_classes: int = 1000
) -> nn.Module:
    settings = config.model
    seed_everything(derive_seed("model", config.run.seed))
    model = family.create_model(
        settings.model,
        settings.attn_type,
        num_classes=num_classes,
        hashing=config.hashing,
        drop_rate=settings.drop,
        drop_path_rate=settings.drop_path,
    )
    return model.to(device)


def _find_source(config: Config) -> str | None:
    """What ``--resume`` names; for ``auto`` a checkpoint of the folder, if it holds one."""
    if config.run.resume != "auto":
        return config.run.resume
    found: list[str | None] = [None]
    run_on_main(lambda: found.append(_find_checkpoint(config.run.output_dir)))
    return broadcast_object(found[-1])


def _find_checkpoint(folder: str) -> str | None:
    """The last one; the best one where the last is missing or was cut short."""
    paths = [os.path.join(folder, name) for name in (LAST_CHECKPOINT, BEST_CHECKPOINT)]
    paths = [path for path in paths if os.path.exists(path)]
    chosen = next(filter(_is_archive, paths), None)
    if chosen is not None and chosen != paths[0]:
        _logger.warning("%s is damaged, so %s takes its place", paths[0], chosen)
    return chosen or next(iter(paths), None)


def _is_archive(path: str) -> bool:
    """Whether a file has the end of an archive, without which it was cut short."""
    try:
        with open(path, "rb") as file:
            file.seek(-min(_NUM_END_BYTES, os.path.getsize(path)), os.SEEK_END)
            end = file.read()
    # The library would call damaged what cannot be read, and the run would replace it.
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); get the right to read it, or "
            "start anew with --resume none."
        ) from error
    return zipfile.is_zipfile(io.BytesIO(end))
