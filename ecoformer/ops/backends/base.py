"""What a backend is. Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ecoformer.errors import InputError
from ecoformer.ops.masks import hide
from ecoformer.ops.precision import compute_dtype, without_autocast


class HashFunctions(NamedTuple):
    """The hash functions of one layer, float."""

    anchors: Tensor  # [H, M, D]
    weight: Tensor  # [H, K, M]
    kernel_mean: Tensor  # [H, M]

    def to(self, dtype: torch.dtype) -> HashFunctions:
        return HashFunctions(*(tensor.to(dtype) for tensor in self))


def empty_rows(like: Tensor) -> Tensor:
    """Allocate rows [B, H, N, D]; the heads of a token lie together, so merging copies nothing."""
    return like.new_empty(like.transpose(1, 2).shape).transpose(1, 2)


class Backend(ABC):
    """One way to compute kernelized hash attention."""

    name: str
    """What ``use_backend`` takes."""
    needs: str = "any device and any float dtype"
    """Part of the error where it cannot run."""

    @abstractmethod
    def can_run(self, q: Tensor, v: Tensor, functions: HashFunctions) -> bool:
        """Decide by devices, dtypes and sizes; reads no data."""

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend as ``kernelized_hash_attention`` does, with a gradient at ``q`` and ``v``.

        Args:
            q: [B, H, N, D], float, raw rows.
            v: [B, H, N, D], float.
            functions: of any float dtype.
            is_normalized: the value bias is ``c sum_j v_j``, not ``c v_i``.
            key_mask: [B, N], bool, on the device of the rows; None where all tokens are real.

        Returns:
            [B, H, N, D], the dtype of ``v``; computed in float32, or float64 where an input is. 0
            for masked tokens.

        Raises:
            InputError: the backend cannot run on these inputs.
        """

    def require(self, q: Tensor, v: Tensor, functions: HashFunctions) -> None:
        """Raise an InputError where the backend cannot run."""
        if not self.can_run(q, v, functions):
            num_bits, num_anchors = functions.weight.shape[-2:]
            raise InputError(
                f"backend {self.name!r} cannot run on {q.device.type} with {q.dtype} rows of head "
                f"dim {q.shape[-1]}, {num_bits} bits and {num_anchors} anchors: it needs "
                f"{self.needs}. Choose another backend, or none."
            )


class FusedBackend(Backend):
    """A backend with a gradient of its own, behind the one custom operator.

    What one forward leaves for the gradient is good for the backward of any other.
    """

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend as ``attend`` does, in the dtype of ``functions``: float32 or float64.

        Rows of masked tokens may hold anything; nothing of them enters a sum or a mean.

        Returns:
            The output [B, H, N, D] in the dtype of ``v``; with codes h, the sums
            ``sum_j [h_j, 1]^T [v_j, 1]`` [B, H, K + 1, D + 1], that of ``v_j`` only where it is
            the bias, the corner 0; and ``kernel_scale`` [B, H]. These have the computing dtype.
            Where rows of an image or the functions of a head are not finite, so are its sums and
            its output: ``find_nan`` of ``ecoformer.ops.codes`` is added to the sums of ``h_j``.
        """

    @abstractmethod
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
        """Differentiate ``forward``, straight through the sign and through the bandwidth.

        Args:
            grad: [B, H, N, D], float, gradient of the output; strides may be 0.
            sums: from the ``forward`` of any fused backend, as ``scale``.

        Returns:
            The gradients of ``q`` and of ``v``, each in its dtype; 0 for masked tokens.
        """

    def attend(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        # Which looks backends up.
        from ecoformer.ops.operator import run

        return run(q, v, *functions, is_normalized, self.name, key_mask)


class ComposedBackend(Backend):
    """A backend of plain PyTorch operations, which autograd and exporters look into.

    Compiled under autocast, its gradients are 16-bit products: PyTorch traces the backward of a
    whole graph in the autocast that the graph was entered with.
    """

    def can_run(self, q: Tensor, v: Tensor, functions: HashFunctions) -> bool:
        return True

    def attend(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        self.require(q, v, functions)
        dtype = compute_dtype(q, v)
        with without_autocast(q):
            rows, values = q.to(dtype), v.to(dtype)
            if key_mask is not None:
                rows, values = hide(rows, key_mask), hide(values, key_mask)
            out = self.compose(
                rows,
                values,
                functions.to(dtype),
                is_normalized=is_normalized,
                key_mask=key_mask,
            )
        return out.to(v.dtype)

    @abstractmethod
    def compose(
        self,
        q: Tensor,
        v: Tensor,
        functions: HashFunctions,
        *,
        is_normalized: bool,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend where all inputs have one dtype, float32 or float64, and autocast is off.

        Rows of masked tokens are 0 here, and have to be 0 in the output.
        """
