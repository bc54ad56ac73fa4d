"""A run as a Python call; the command line, the demo and the tables stand on these.

A run talks to the logger ``ecoformer``, which ``print_log`` shows as the command line does, and
shows progress on standard error. It seeds the global generators anew in every step. Under torchrun
each call joins the ranks and leaves them at its end; a ``torch.distributed`` group that is there
already is used and left as it is. It must reach the CPU (``cpu:gloo,cuda:nccl``).

``family`` is a backbone and ``task`` a class that are not registered, in place of those that
``config`` names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ecoformer.checkpoint import load_checkpoint
from ecoformer.config import Config, read_config, to_yaml
from ecoformer.engine.compiling import compile_model
from ecoformer.engine.evaluate import measure
from ecoformer.engine.folder import RunFolder
from ecoformer.engine.launch import process_group
from ecoformer.engine.logs import read_log
from ecoformer.engine.precision import choose_amp_dtype, settled_arithmetic
from ecoformer.engine.resume import load_for_evaluation, start_state
from ecoformer.engine.session import Session, TaskMaker, create_model, create_task
from ecoformer.engine.state import LAST_CHECKPOINT
from ecoformer.engine.throughput import NUM_BATCHES, Throughput, measure_throughput
from ecoformer.engine.train import train_model
from ecoformer.errors import InputError
from ecoformer.files import write_text
from ecoformer.models.registry import ModelFamily
from ecoformer.ranks import run_on_main
from ecoformer.tasks.base import Metrics

_logger = logging.getLogger(__name__)


class Run:
    """A run that was trained; ``build`` makes its model when that is first asked for."""

    def __init__(self, folder: Path, config: Config, build: Callable[[], nn.Module]) -> None:
        self.folder = folder
        self.config = config
        self._build = build

    @cached_property
    def model(self) -> nn.Module:
        """In eval mode, after the last epoch; an InputError if its data or checkpoint are gone."""
        return self._build().eval()

    @property
    def log(self) -> list[dict[str, float]]:
        return read_log(self.folder)


def train(
    config: Config, *, family: ModelFamily | None = None, task: TaskMaker | None = None
) -> Run:
    """Train, or go on from the checkpoint in ``config.run.output_dir``.

    In the main thread, the signals of ``STOP_SIGNALS`` save and stop while this lasts.

    Raises:
        InputError: a setting, the data, a checkpoint or the disk.
        NonFiniteError: a loss, gradient, weight or hash function became NaN or infinite.
        Preempted: a signal came, and the state is saved; the same call goes on.
    """
    folder = RunFolder(Path(config.run.output_dir))
    with _prepared(config) as device, folder.held():
        session = Session.open(config, device, task=task, is_train=True)
        model = create_model(config, session.task, family).to(device)
        state = start_state(session, model)
        run_on_main(lambda: write_text(folder.path / "config.yaml", to_yaml(config)))
        train_model(session, state, folder)
        return Run(folder.path, config, lambda: model)


def evaluate(
    config: Config, *, family: ModelFamily | None = None, task: TaskMaker | None = None
) -> Metrics:
    """Measure the weights of ``config.run.resume``; ``"auto"`` are the folder's.

    Raises:
        InputError: a setting, the data or the weights.
        NonFiniteError: the model's output is not finite.
    """
    with _prepared(config) as device:
        session = Session.open(config, device, task=task, is_train=False)
        model = create_model(config, session.task, family).to(device)
        load_for_evaluation(model, config)
        metrics = measure(
            session, compile_model(model, config.run.compile_mode) if config.run.compile else model
        )
        _logger.info("%s", metrics)
        return metrics


def load_run(
    folder: str | Path, *, family: ModelFamily | None = None, task: TaskMaker | None = None
) -> Run:
    """Open the folder of a run; its model is built, on the CPU, when it is asked for.

    Raises:
        InputError: it is no run.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").exists():
        raise InputError(f"{folder} is no run: it holds no config.yaml; give a run's folder.")
    config = read_config(folder / "config.yaml")

    def build() -> nn.Module:
        session = Session.open(config, torch.device("cpu"), task=task, is_train=False)
        model = create_model(config, session.task, family)
        load_checkpoint(model, folder / LAST_CHECKPOINT, strict=True)
        return model

    return Run(folder, config, build)


def time_model(
    config: Config, *, family: ModelFamily | None = None, task: TaskMaker | None = None
) -> Throughput:
    """Time a model in eval mode, without data or weights, by ``config.run.throughput``.

    Without mixed precision unless ``config`` names one: the released protocol has none, but for
    convolutions, which a GPU computes in TF32 there.
    """
    batch_size = config.data.batch_size
    with _prepared(config, has_tf32=True) as device:
        amp_dtype = choose_amp_dtype(config.run.amp_dtype or "none", device)
        made = create_task(config, task)
        _logger.info("timing %d batches of %d %s", NUM_BATCHES, batch_size, made.samples)
        throughput = measure_throughput(
            create_model(config, made, family).to(device),
            made.draw_inputs(batch_size, torch.Generator().manual_seed(0)),
            batch_size=batch_size,
            samples=made.samples,
            protocol=config.run.throughput or "median",
            amp_dtype=amp_dtype,
            compile_mode=config.run.compile_mode if config.run.compile else None,
        )
        size = made.describe_inputs()
        _logger.info(
            "%s/%s, batch %d%s, %s on %s: %s",
            config.model.model,
            config.model.attn_type,
            batch_size,
            f" of {size}" if size else "",
            str(amp_dtype).removeprefix("torch."),
            device,
            throughput,
        )
        return throughput


@contextmanager
def _prepared(config: Config, *, has_tf32: bool = False) -> Iterator[torch.device]:
    """Join the ranks and settle the arithmetic for a block; yields this process's device."""
    run = config.run
    with (
        settled_arithmetic(is_deterministic=run.deterministic, has_tf32=has_tf32),
        process_group(run.device, run.dist_timeout) as device,
    ):
        yield device
