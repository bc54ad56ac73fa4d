"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ecoformer.checkpoint import save_atomic
from ecoformer.errors import InputError, NonFiniteError

_logger = logging.getLogger(__name__)


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread; a step waits for the copy alone.

    The copy stays in memory, since filling pages a second time is several times faster. It costs
    as much host memory as a checkpoint is large, page-locked for one from a GPU.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._copy: Any = None

    def write(self, checkpoint: Mapping[str, Any], paths: Sequence[Path]) -> None:
        """Copy a checkpoint, and begin to write it; a disk that refuses costs a warning.

        Args:
            checkpoint: ``model``, a state dict on any device; beside it other tensors, containers
                and plain values.
            paths: files, written one after the other.

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

        Args:
            checkpoint: see ``write``.
            paths: files, written one after the other.

        Raises:
            InputError: the disk refuses.
            NonFiniteError: a weight is not finite, here or in the checkpoint before.
        """
        self.wait()
        _save(checkpoint, paths)

    def wait(self) -> None:
        """Come back when nothing is being written.

        Raises:
            NonFiniteError: a weight is not finite; nothing was written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
    """A copy, in the tensors of an old one where they fit; those from a GPU may still come."""
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
