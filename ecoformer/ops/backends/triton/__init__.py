"""Triton kernels; ``kernels`` and ``launch`` need Triton to import."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ecoformer.ops.backends.base import FusedBackend, HashFunctions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 128
_MAX_CODE_DIM = 64
# What the largest kernels take of a program's shared memory.
_MIN_SHARED_BYTES = 160_000


class TritonBackend(FusedBackend):
    """Triton's kernels; in its interpreter, on any device."""

    name = "triton"
    needs = (
        "Triton, an NVIDIA GPU with the shared memory of an A100, float32 or 16-bit rows, head "
        f"dims up to {_MAX_HEAD_DIM}, and up to {_MAX_CODE_DIM} bits and anchors"
    )

    def can_run(self, q: Tensor, v: Tensor, functions: HashFunctions) -> bool:
        return (
            (_is_interpreted() or (q.is_cuda and _can_compile(q.device)))
            and q.dtype in _DTYPES
            and v.dtype in _DTYPES
            and q.shape[-1] <= _MAX_HEAD_DIM
            and max(functions.weight.shape[-2:]) <= _MAX_CODE_DIM
        )

    # ``launch`` imports Triton, which many runs do without.

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
    # PyTorch brings Triton along on Linux only; older devices than the A100 have too little
    # shared memory and no TF32, and on others than NVIDIA's nobody has tried.
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    # PyTorch's types do not know this property.
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= _MIN_SHARED_BYTES)


def can_convolve(x: Tensor) -> bool:
    """Decide by device and dtype whether the kernels of ``depthwise`` run on maps like ``x``."""
    return x.dtype in _DTYPES and (_is_interpreted() or (x.is_cuda and _is_recent(x.device)))


@torch.compiler.assume_constant_result
def _is_recent(device: torch.device) -> bool:
    """Tell whether Triton is here, and the GPU has bfloat16."""
    return _find_capability(device) >= (8, 0)


@functools.cache
def _find_capability(device: torch.device) -> tuple[int, int]:
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)
