"""When a run saves, and checkpoints that are written while training goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ecoformer.checkpoint import save_atomic
from ecoformer.config import Config
from ecoformer.engine.folder import RunFolder
from ecoformer.engine.state import BEST_CHECKPOINT, LAST_CHECKPOINT, TrainState
from ecoformer.errors import InputError, NonFiniteError
from ecoformer.ranks import run_on_main

_logger = logging.getLogger(__name__)


class Saver:
    """Saves a run's state into its folder, in a ``with`` block that ends when all is written."""

    def __init__(self, state: TrainState, config: Config, folder: RunFolder) -> None:
        self._state = state
        self._config = config
        self._folder = folder
        self._writer = BackgroundWriter()
        self._last_save = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether ``checkpoint_every`` minutes have passed since the last save."""
        return 0 < 60 * self._config.run.checkpoint_every <= time.monotonic() - self._last_save

    def save(self, *, is_best: bool = False, is_last: bool = False) -> None:
        """Write the last checkpoint, and the best one before it where this is the best.

        Every rank must call. A run that dies between the two does this epoch again, and the best
        one with it. The last save of a run comes back when its files are there.

        Raises:
            InputError: the disk refuses the last save; any other costs a warning. Or the folder
                has gone.
            NonFiniteError: a weight is not finite, here or in the save before; nothing is written.
        """
        checkpoint = self._state.to_checkpoint(self._config)
        names = (BEST_CHECKPOINT, LAST_CHECKPOINT) if is_best else (LAST_CHECKPOINT,)
        paths = [self._folder.path / name for name in names]

        def write() -> None:
            self._folder.check()
            (self._writer.write_now if is_last else self._writer.write)(checkpoint, paths)

        run_on_main(write)
        self._last_save = time.monotonic()

    def wait(self) -> None:
        self._writer.wait()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.__exit__(*exception)


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread; a step waits for the copy alone.

    The copy stays in host memory, page-locked for a GPU: filling pages again is several times
    faster.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._copy: Any = None

    def write(self, checkpoint: Mapping[str, Any], paths: Sequence[Path]) -> None:
        """Copy a checkpoint, and begin to write it; a disk that refuses costs a warning.

        Raises:
            NonFiniteError: a weight of the checkpoint before is not finite.
        """
        self.wait()
        self._copy = _copy_to_host(checkpoint, self._copy)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._pending = self._thread.submit(_save_or_warn, self._copy, paths)

    def write_now(self, checkpoint: Mapping[str, Any], paths: Sequence[Path]) -> None:
        """Write a checkpoint, and come back when its files are there.

        Raises:
            InputError: the disk refuses.
            NonFiniteError: a weight is not finite, here or in the checkpoint before.
        """
        self.wait()
        _save(checkpoint, paths)

    def wait(self) -> None:
        """Come back when nothing is being written; raises NonFiniteError as ``write`` would."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()


def _save_or_warn(checkpoint: Mapping[str, Any], paths: Sequence[Path]) -> None:
    try:
        _save(checkpoint, paths)
    except InputError as error:
        _logger.warning("%s The run goes on without this checkpoint.", error)


def _save(checkpoint: Mapping[str, Any], paths: Sequence[Path]) -> None:
    tensors = {k: v for k, v in checkpoint["model"].items() if v.is_floating_point()}
    # The norm takes one pass, and a tenth of the time.
    if not get_total_norm(tensors.values()).isfinite():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise NonFiniteError(
                    f"{name} is not finite; the last checkpoint is untouched. Try a lower --lr, "
                    "--clip-grad, or --amp-dtype bfloat16."
                )
    for path in paths:
        save_atomic(checkpoint, path)


def _copy_to_host(value: Any, old: Any) -> Any:
    """Copy into the tensors of an old copy where they fit; those from a GPU may still come."""
    if isinstance(value, Tensor):
        is_fit = isinstance(old, Tensor) and (old.shape, old.dtype) == (value.shape, value.dtype)
        if not is_fit:
            old = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return old.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        old = old if isinstance(old, Mapping) else {}
        return {key: _copy_to_host(item, old.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy_to_host(item, None) for item in value)
    return value
