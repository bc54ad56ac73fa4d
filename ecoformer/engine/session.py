"""What a run has from its start to its end; what changes is in ``TrainState``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecoformer.config import Config
from ecoformer.engine.distillation import Distillation
from ecoformer.engine.precision import autocast, choose_amp_dtype
from ecoformer.errors import InputError
from ecoformer.models.registry import ModelFamily, find_family
from ecoformer.seeding import derive_seed, seeded
from ecoformer.tasks import find_task
from ecoformer.tasks.base import Data, Network, Packed, Task

# A class, registered or not; whatever makes a task from a configuration will do.
TaskMaker = Callable[[Config], Task]


@dataclass(frozen=True)
class Session:
    """A run's settings, task and data, and where and in which precision it computes."""

    config: Config
    task: Task
    data: Data
    device: torch.device
    amp_dtype: torch.dtype

    @classmethod
    def open(
        cls, config: Config, device: torch.device, *, task: TaskMaker | None, is_train: bool
    ) -> Session:
        """Open the data of a task; with ``is_train`` off only those for evaluation.

        Raises:
            InputError: there is no such task, data or precision.
        """
        made = create_task(config, task)
        if is_train and config.distillation.distill != "none":
            made = Distillation(made)
        return cls(
            config=config,
            task=made,
            data=made.open_data(device, is_train=is_train),
            device=device,
            amp_dtype=choose_amp_dtype(config.run.amp_dtype, device),
        )

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir)

    @cached_property
    def _copies(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def move(self, batch: Any) -> Any:
        """Bring a batch to the device, beside what that computes, and unpack it there.

        The host runs ahead of a CUDA device, so that this batch is there when its step begins.
        """
        if self.device.type != "cuda":
            return move_to(batch, self.device)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            moved = move_to(batch, self.device)
        current.wait_stream(self._copies)
        for tensor in tensors_of(moved):
            # Its memory is the other stream's, which must not use it again before this one is done.
            tensor.record_stream(current)
        return moved

    def compute(self, network: nn.Module) -> Network:
        """Let a network compute in the run's precision."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with autocast(self.device, self.amp_dtype):
                return network(*args, **kwargs)

        return call


def create_task(config: Config, task: TaskMaker | None = None) -> Task:
    """Make the given task, or the one that the configuration names."""
    return (task or find_task(config.run.task))(config)


def create_model(config: Config, task: Task, family: ModelFamily | None = None) -> nn.Module:
    """Build a task's model on the CPU, with weights drawn from the run's seed."""
    settings = config.model

    def create(attention: str | None = settings.attn_type, **options: Any) -> nn.Module:
        known = family or find_family(settings.model)
        if task.inputs not in (None, known.inputs):
            raise InputError(
                f"{settings.model} takes {known.inputs}, and --task {config.run.task} gives "
                f"{task.inputs}; name another --model."
            )
        return known.create_model(
            settings.model,
            attention,
            input_size=settings.input_size,
            hashing=config.hashing,
            drop_path_rate=settings.drop_path,
            # As released: of the backbone. timm's drop_rate is that of the head.
            **dict.fromkeys(known.drop_rates, settings.drop),
            **settings.keywords,
            **options,
        )

    with seeded(derive_seed("model", config.run.seed)):
        return task.create_model(create)


def move_to(batch: Any, device: torch.device) -> Any:
    """Copy a nest of tuples, lists and dicts, its tensors to a device; does not wait for them.

    What is ``Packed`` arrives unpacked.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Packed):
        return batch.unpack(device)
    if isinstance(batch, Mapping):
        return {name: move_to(item, device) for name, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        items = [move_to(item, device) for item in batch]
        # A named tuple takes its fields one by one.
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Find the tensors of a nest of tuples, lists and dicts."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(item)
