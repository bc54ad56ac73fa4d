"""Kernels in C++ for the CPU, where codes are bits: what meets a code is added or looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from ecoformer.errors import InputError
from ecoformer.ops.backends.base import FusedBackend, HashFunctions
from ecoformer.ops.backends.native import library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 128
_MAX_BITS = 64


class NativeBackend(FusedBackend):
    """Compiled on first use. Results have the same bits for any number of threads.

    Operators of its own, ``ecoformer_native::forward`` and ``backward``, stand in what is exported
    with it: a process that loads the library, in Python or in C++, runs that without this package.
    """

    name = "native"
    needs = (
        "a CPU, a C++ compiler (ecoformer doctor says more), float32 or 16-bit rows, head dims up "
        f"to {_MAX_HEAD_DIM}, and 1 to {_MAX_BITS} bits"
    )

    def can_run(self, q: Tensor, v: Tensor, functions: HashFunctions) -> bool:
        return (
            q.is_cpu
            and q.dtype in _DTYPES
            and v.dtype in _DTYPES
            and max(q.shape[-1], v.shape[-1]) <= _MAX_HEAD_DIM
            and 1 <= functions.weight.shape[-2] <= _MAX_BITS
            and not library.load()
        )

    def require(self, q: Tensor, v: Tensor, functions: HashFunctions) -> None:
        if reason := library.load():
            raise InputError(
                f"backend {self.name!r} cannot run here: {reason}. Choose another backend, or none."
            )
        super().require(q, v, functions)

    def attend(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        if not torch.compiler.is_exporting():
            return super().attend(q, v, functions, is_normalized=is_normalized, key_mask=key_mask)
        self.require(q, v, functions)
        return self.forward(
            q, v, functions.to(torch.float32), is_normalized=is_normalized, key_mask=key_mask
        )[0]

    def forward(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.ecoformer_native.forward(q, v, *functions, key_mask, is_normalized)

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
        return torch.ops.ecoformer_native.backward(
            grad, q, v, *functions, key_mask, sums, scale, is_normalized
        )
