"""Triton kernels; ``kernels`` and ``launch`` need Triton to import."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor
from wrapt import when_imported

from ecoformer.ops.backends.base import FusedBackend, HashFunctions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 128
_MAX_CODE_DIM = 64
# NVIDIA's first with bfloat16 in its tensor cores: A100 and RTX 3090.
_MIN_CAPABILITY = (8, 0)


class TritonBackend(FusedBackend):
    """Triton's kernels; in its interpreter, on any device."""

    name = "triton"
    needs = (
        "Triton, an NVIDIA GPU of the generation of an A100 or later, float32 or 16-bit rows, head "
        f"dims up to {_MAX_HEAD_DIM}, up to {_MAX_CODE_DIM} bits and anchors, and shared memory "
        "for these sizes"
    )

    # ``launch`` imports Triton, which many runs do without.

    def can_run(self, q: Tensor, v: Tensor, functions: HashFunctions) -> bool:
        if not (
            (_is_interpreted() or (q.is_cuda and _can_compile(q.device)))
            and q.dtype in _DTYPES
            and v.dtype in _DTYPES
            and q.shape[-1] <= _MAX_HEAD_DIM
            and max(functions.weight.shape[-2:]) <= _MAX_CODE_DIM
        ):
            return False
        from ecoformer.ops.backends.triton import launch

        return launch.fits(q, functions)

    def forward(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from ecoformer.ops.backends.triton import launch

        return launch.forward(q, v, functions, is_normalized=is_normalized, key_mask=key_mask)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        sums: Tensor,
        scale: Tensor,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        from ecoformer.ops.backends.triton import launch

        return launch.backward(
            grad, q, v, functions, sums, scale, is_normalized=is_normalized, key_mask=key_mask
        )


def _is_interpreted() -> bool:
    """Tell whether Triton runs kernels step by step in Python, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _can_compile(device: torch.device) -> bool:
    # PyTorch brings Triton along on Linux only; nobody has tried other devices than NVIDIA's.
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY


def can_convolve(x: Tensor) -> bool:
    """Decide by device and dtype whether the kernels of ``depthwise`` run on maps like ``x``."""
    return x.dtype in _DTYPES and (_is_interpreted() or (x.is_cuda and _is_recent(x.device)))


def _is_recent(device: torch.device) -> bool:
    return _can_compile(device)


# Which takes a second to import.
@when_imported("torch._dynamo")
def _mark_constant(dynamo: ModuleType) -> None:
    """Let graphs take the answer as it is, and not look into the question."""
    dynamo.assume_constant_result(_is_recent)
