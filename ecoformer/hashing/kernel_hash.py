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

    All state is in buffers, since no gradient reaches it: ``weight`` [H, K, M],
    ``kernel_mean`` [H, M], ``anchors`` [H, M, D], float32, and ``is_fitted`` [], bool.
    Nothing is fitted in a forward: see ``fit_hash_functions``.

    Args:
        num_heads: H.
        head_dim: D.
        config: sizes and value bias.

    Source: EcoFormer, arXiv 2209.09004.
    """

    weight: Tensor
    kernel_mean: Tensor
    anchors: Tensor
    is_fitted: Tensor

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
        """Make the Python mirror of ``is_fitted`` follow the buffer, after a broadcast, say."""
        if not self.is_fitted.is_meta:
            self._is_fitted = bool(self.is_fitted)

    @torch.no_grad()
    def set_functions(self, *, weight: Tensor, kernel_mean: Tensor, anchors: Tensor) -> None:
        """Take hash functions over; the module is fitted from then on.

        Args:
            weight: [H, K, M], float.
            kernel_mean: [H, M], float.
            anchors: [H, M, D], float, unit rows.
        """
        self.weight.copy_(weight)
        self.kernel_mean.copy_(kernel_mean)
        self.anchors.copy_(anchors)
        self.is_fitted.fill_(True)
        self._is_fitted = True

    def encode(self, q: Tensor) -> Tensor:
        """Binary codes of raw rows.

        Args:
            q: [B, H, N, D], float.

        Returns:
            [B, H, N, K] in {-1, +1}, float32, or float64 where ``q`` is.

        Raises:
            InputError: the hash functions are not fitted.
        """
        self._require_fitted()
        return encode(
            normalize_rows(q),
            anchors=self.anchors,
            weight=self.weight,
            kernel_mean=self.kernel_mean,
        )

    def forward(self, q: Tensor, v: Tensor) -> Tensor:
        """Attend over ``v`` through the codes of ``q``.

        Args:
            q: [B, H, N, D], float, raw rows of the shared query-key projection.
            v: [B, H, N, D], float.

        Returns:
            [B, H, N, D], the dtype of ``v``.

        Raises:
            InputError: the hash functions are not fitted.
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
        """Tell ``print(model)`` the sizes.

        Returns:
            H, K and M, e.g. ``heads=1, bits=16, anchors=25``.
        """
        num_heads, num_bits, num_anchors = self.weight.shape
        return f"heads={num_heads}, bits={num_bits}, anchors={num_anchors}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh_fitted()
