"""Distillation of a softmax teacher, beside whatever loss a task has.

The teacher is the network's softmax parent: of the same architecture, frozen, in eval mode. It gets
what the network gets, in the same precision, and is no part of what trains, is saved or is shared
between ranks.

Sources: attention outputs, arXiv 2609.35745; layers first, then the network, arXiv 2603.16063.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecoformer.attention import MultiHeadAttention
from ecoformer.checkpoint import LoadReport, load_checkpoint, read_checkpoint
from ecoformer.engine.digests import digest, require_same_on_all
from ecoformer.engine.precision import autocast, choose_amp_dtype
from ecoformer.engine.sources import fetch
from ecoformer.errors import InputError
from ecoformer.ops import as_full_precision
from ecoformer.ranks import run_on_all
from ecoformer.tasks.base import Data, Meter, Network, Task, TrainBatches

_SOFTMAX = "msa"

_logger = logging.getLogger(__name__)


class Distillation(Task):
    """A task whose network also learns from a teacher; a batch is (step in the run, its batch).

    The loss is that of the task, or where logits are compared KL(teacher, network) in its place,
    plus ``distill_weight`` times the mean over layers of the mean squared error of attention
    outputs, after the output projection. Compared are the layers that are made of softmax ones.

    Raises:
        InputError: logits are to be compared, and the task has none.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task.config)
        self._task = task
        self._settings = settings = task.config.distillation
        if settings.compares_logits and not task.has_logits:
            raise InputError(
                f"--distill {settings.distill} compares logits, and --task "
                f"{task.config.run.task} has none; use --distill output."
            )
        self.samples, self.inputs, self.has_logits = task.samples, task.inputs, task.has_logits
        self._digest = ""

    def open_data(self, device: torch.device, *, is_train: bool) -> Data:
        data = self._task.open_data(device, is_train=is_train)
        assert data.train is not None
        num_steps = len(data.train) * self.config.optim.epochs
        if self._settings.align_steps > num_steps:
            raise InputError(
                f"--align-steps {self._settings.align_steps} are more than the {num_steps} steps "
                "of the run; give at most as many."
            )
        self._device = device
        self._amp_dtype = choose_amp_dtype(self.config.run.amp_dtype, device)
        return replace(data, train=_NumberedBatches(data.train))

    def create_model(self, create: Callable[..., nn.Module]) -> nn.Module:
        """Build the task's model, and load its teacher beside it.

        Raises:
            InputError: the model has no softmax parent, or ``--teacher`` is none of its.
        """
        model = self._task.create_model(create)
        settings, name = self.config.model, self._settings.teacher
        layers = {
            path: layer
            for path, layer in model.named_modules()
            if isinstance(layer, MultiHeadAttention) and layer.parent == _SOFTMAX
        }
        if not layers:
            raise InputError(
                f"--distill compares layers that were made of softmax attention, and "
                f"{settings.model}/{settings.attn_type} has none; choose --attn_type ecoformer."
            )
        teacher = self._task.create_model(partial(create, attention=_SOFTMAX))
        assert name is not None
        file = fetch(name)
        report = run_on_all(lambda: self._load(teacher, read_checkpoint(file), name))[0]
        require_same_on_all(
            teacher.state_dict(),
            f"--teacher {name} holds other weights",
            "put it on a disk that all hosts share, or copy one file to all",
        )
        self._digest = digest(teacher.state_dict())
        self._teacher = teacher.to(self._device).eval().requires_grad_(False)
        self._pairs = [
            (_Tap(layer), _Tap(teacher.get_submodule(path)))
            for path, layer in layers.items()
            if self._settings.compares_outputs
        ]
        _logger.info(
            "teacher %s/%s, compared in the outputs of %d layers%s: %s",
            *(settings.model, _SOFTMAX, len(self._pairs)),
            " and in the logits" if self._settings.compares_logits else "",
            report,
        )
        return model

    def _load(self, teacher: nn.Module, checkpoint: Mapping[str, Any], name: str) -> LoadReport:
        """Take weights that are whole and of the same names, head included."""
        parent = f"{self.config.model.model}/{_SOFTMAX}"
        wanted = f"--teacher takes the softmax stage of this model, {parent}"
        try:
            report = load_checkpoint(teacher, checkpoint, origin=name)
        except InputError as error:
            raise InputError(f"{wanted}. {error}") from None
        if report.derived or report.dropped or report.missing or report.unused:
            raise InputError(f"{wanted}, trained on the same classes. {report}")
        return report

    def start_from(
        self, model: nn.Module, source: str | PathLike[str], *, allow_missing: bool
    ) -> LoadReport:
        return self._task.start_from(model, source, allow_missing=allow_missing)

    def settings(self) -> Mapping[str, Any]:
        return {**self._task.settings(), "teacher_digest": self._digest}

    def loss(self, network: Network, batch: Any) -> Tensor:
        step, batch = batch
        compared: list[Tensor] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._watch() as taps:
                with torch.no_grad(), autocast(self._device, self._amp_dtype):
                    theirs = self._teacher(*args, **kwargs)
                if step < self._settings.align_steps:
                    for ours, other in taps:
                        ours.substitute = other.taken
                given = network(*args, **kwargs)
                compared.append(self._compare(taps, given, theirs))
            return given

        loss = self._task.loss(call, batch)
        matched = torch.stack(compared).mean()
        return matched if self._settings.compares_logits else loss + matched

    def _compare(self, taps: Sequence[_Pair], logits: Any, teacher_logits: Any) -> Tensor:
        terms = []
        if self._settings.compares_logits:
            ours, theirs = (
                as_full_precision(x).flatten(0, -2).log_softmax(-1)
                for x in (logits, teacher_logits)
            )
            terms.append(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))
        if taps:
            errors = [
                F.mse_loss(as_full_precision(ours.given), as_full_precision(theirs.given))
                for ours, theirs in taps
            ]
            terms.append(self._settings.distill_weight * torch.stack(errors).mean())
        return torch.stack(terms).sum()

    @contextmanager
    def _watch(self) -> Iterator[Sequence[_Pair]]:
        """Open the taps of the layers that are compared, if any, and forget what they saw."""
        taps = [tap for pair in self._pairs for tap in pair]
        for tap in taps:
            tap.is_open = True
        try:
            yield self._pairs
        finally:
            for tap in taps:
                tap.close()

    def prepare(self, batch: Any) -> Any:
        step, batch = batch
        return step, self._task.prepare(batch)

    def fit_inputs(self, batch: Any) -> Any:
        _, batch = batch
        return self._task.fit_inputs(batch)

    def start_evaluation(self, device: torch.device) -> Meter:
        return self._task.start_evaluation(device)

    def draw_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Any, ...]:
        return self._task.draw_inputs(batch_size, generator)

    def describe_inputs(self) -> str:
        return self._task.describe_inputs()

    def name_samples(self, epoch: int, step: int) -> Mapping[str, Sequence[Any]]:
        return self._task.name_samples(epoch, step)


class _NumberedBatches:
    """Batches beside the number of their step, counted from the start of the run."""

    def __init__(self, batches: TrainBatches) -> None:
        self._batches = batches
        self._first = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self._batches.set_epoch(epoch, start_step)
        self._first = epoch * len(self) + start_step

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self._batches, self._first)


class _Tap:
    """Notes what a layer takes and gives while it is open; may have it take something else.

    It stays on the layer, where a compiled model knows of it; a closed one holds nothing.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.close()
        layer.register_forward_pre_hook(self._take)
        layer.register_forward_hook(self._give)

    def close(self) -> None:
        self.is_open = False
        self.substitute: Tensor | None = None
        self.taken = self.given = torch.empty(0)

    def _take(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.is_open or self.substitute is None:
            return None
        x, *rest = args
        # What was to come keeps a gradient, of zeros: DistributedDataParallel waits for each.
        is_replaced = torch.ones((), dtype=torch.bool, device=x.device)
        return torch.where(is_replaced, self.substitute, x), *rest

    def _give(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.is_open:
            self.taken, self.given = args[0], output


_Pair: TypeAlias = tuple[_Tap, _Tap]
