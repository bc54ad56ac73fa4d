"""The hash functions of one attention layer, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.ops import encode, kernelized_hash_attention, normalize_rows


class KernelHash(nn.Module):
    """K learned binary hash functions a head, and attention through their codes.

    All state is in buffers, since no gradient reaches it. Nothing is fitted in a forward: see
    ``fit_hash_functions``. Shapes: B batch, H heads, N tokens, D head dim, K bits, M anchors.

    Source: EcoFormer, arXiv 2209.09004.
    """

    weight: Tensor  # [H, K, M], float32
    kernel_mean: Tensor  # [H, M], float32
    anchors: Tensor  # [H, M, D], float32, unit rows
    is_fitted: Tensor  # [], bool

    def __init__(self, num_heads: int, head_dim: int, config: HashConfig) -> None:
        super().__init__()
        self.config = config
        num_bits, num_anchors = config.num_bits, config.num_anchors
        self.register_buffer("weight", torch.zeros(num_heads, num_bits, num_anchors))
        self.register_buffer("kernel_mean", torch.zeros(num_heads, num_anchors))
        self.register_buffer("anchors", torch.zeros(num_heads, num_anchors, head_dim))
        self.register_buffer("is_fitted", torch.tensor(False))
        # What forward tests: reading the buffer would wait for the device and break graphs.
        self._is_fitted = False

    def refresh_fitted(self) -> None:
        """Follow the buffer ``is_fitted``, after a broadcast, say."""
        if not self.is_fitted.is_meta:
            self._is_fitted = bool(self.is_fitted)

    @torch.no_grad()
    def set_functions(self, *, weight: Tensor, kernel_mean: Tensor, anchors: Tensor) -> None:
        """Copy hash functions of any float dtype; the module is fitted from then on."""
        self.weight.copy_(weight)
        self.kernel_mean.copy_(kernel_mean)
        self.anchors.copy_(anchors)
        self.is_fitted.fill_(True)
        self._is_fitted = True

    def encode(self, q: Tensor) -> Tensor:
        """Encode raw rows [B, H, N, D] as ``ops.encode`` does; unfitted is an InputError."""
        self._require_fitted()
        return encode(
            normalize_rows(q),
            anchors=self.anchors,
            weight=self.weight,
            kernel_mean=self.kernel_mean,
        )

    def forward(self, q: Tensor, v: Tensor) -> Tensor:
        """Attend over v [B, H, N, D] through the codes of raw rows q [B, H, N, D].

        As ``kernelized_hash_attention``; unfitted is an InputError.
        """
        self._require_fitted()
        return kernelized_hash_attention(
            q,
            v,
            anchors=self.anchors,
            weight=self.weight,
            kernel_mean=self.kernel_mean,
            value_bias=self.config.value_bias,
        )

    def _require_fitted(self) -> None:
        if not self._is_fitted:
            raise InputError(
                "the hash functions are not fitted: load an EcoFormer checkpoint, or call "
                "ecoformer.fit_hash_functions(model, images)."
            )

    def extra_repr(self) -> str:
        """Say for ``print(model)``, e.g., ``heads=1, bits=16, anchors=25``."""
        num_heads, num_bits, num_anchors = self.weight.shape
        return f"heads={num_heads}, bits={num_bits}, anchors={num_anchors}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh_fitted()
