"""The hash functions of one attention layer, as a module."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.ops import as_full_precision, encode, kernelized_hash_attention, normalize_rows
from ecoformer.ops.precision import compute_dtype

_FUNCTIONS = ("weight", "kernel_mean", "anchors")
# Anchors are unit rows, and a mean of different ones is shorter: by more than this in a file, where
# they may have been rounded to half precision, and in memory.
_MAX_SHORTFALL_IN_FILE = 0.05
_MAX_SHORTFALL = 1e-5
# Of a mean of equal ones, by rounding.
_MAX_DRIFT = 1e-2


class KernelHash(nn.Module):
    """K learned binary hash functions a head, and attention through their codes.

    All state is in buffers, since no gradient reaches it. Nothing is fitted in a forward: see
    ``fit_hash_functions``. Shapes: B batch, H heads, N tokens, D head dim, K bits, M anchors.

    A moving average of a model (timm's ``ModelEmaV3``, PyTorch's ``AveragedModel``) keeps a deep
    copy, and mixes the buffers of the two in place. A mixture of two hash functions is none, so the
    copy takes those of its original whole.

    Hash functions stay float32 in a model of half precision, where rounding would flip codes, and
    become float64 with a model that does.

    Source: EcoFormer, arXiv 2209.09004.
    """

    weight: Tensor  # [H, K, M], float32
    kernel_mean: Tensor  # [H, M], float32
    anchors: Tensor  # [H, M, D], float32, unit rows
    is_fitted: Tensor  # [], bool

    # Of a deep copy alone: what it was copied from.
    _original: weakref.ref[KernelHash] | None = None
    # The flag as last read, with the count of what was written into it; tensors of inference mode
    # count nothing.
    _seen: tuple[Tensor, int | None] | None = None

    def __init__(self, num_heads: int, head_dim: int, config: HashConfig) -> None:
        super().__init__()
        self.config = config
        num_bits, num_anchors = config.num_bits, config.num_anchors
        for name, shape in {
            "weight": (num_heads, num_bits, num_anchors),
            "kernel_mean": (num_heads, num_anchors),
            "anchors": (num_heads, num_anchors, head_dim),
        }.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("is_fitted", torch.tensor(False))
        # What forward tests: reading the buffer would wait for the device and break graphs.
        self._is_fitted = False
        self._look()

    def refresh_fitted(self) -> None:
        """Follow the buffer ``is_fitted``; forward does so where it was written or replaced.

        Compiled code does not look: call this after a broadcast, say.
        """
        if not self.is_fitted.is_meta:
            self._is_fitted = bool(self.is_fitted)
        self._look()

    @torch.no_grad()
    def set_functions(self, *, weight: Tensor, kernel_mean: Tensor, anchors: Tensor) -> None:
        """Copy hash functions of any float dtype; the module is fitted from then on."""
        self.weight.copy_(weight)
        self.kernel_mean.copy_(kernel_mean)
        self.anchors.copy_(anchors)
        self.is_fitted.fill_(True)
        self._is_fitted = True
        self._look()

    def encode(self, q: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Encode raw rows [B, H, N, D] as ``ops.encode`` does; unfitted is an InputError."""
        self._require_fitted()
        return encode(
            normalize_rows(q),
            anchors=self.anchors,
            weight=self.weight,
            kernel_mean=self.kernel_mean,
            key_mask=key_mask,
        )

    def forward(self, q: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
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
            key_mask=key_mask,
        )

    def _require_fitted(self) -> None:
        if not torch.compiler.is_compiling():
            self._follow_original()
            self._follow_flag()
        if not self._is_fitted:
            raise InputError(
                "the hash functions are not fitted: load an EcoFormer checkpoint, or call "
                "ecoformer.fit_hash_functions(model, images)."
            )

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``: ``heads=1, bits=16, anchors=25``."""
        num_heads, num_bits, num_anchors = self.weight.shape
        return f"heads={num_heads}, bits={num_bits}, anchors={num_anchors}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name = f"{prefix}is_fitted"
        if name in state_dict:
            anchors = state_dict.get(f"{prefix}anchors")
            state_dict[name] = read_flag(state_dict[name], anchors, prefix.rstrip("."))
        for name in _FUNCTIONS:
            # Assigned, a file's rounded functions would set the type of later fits.
            if isinstance(tensor := state_dict.get(f"{prefix}{name}"), Tensor):
                state_dict[f"{prefix}{name}"] = as_full_precision(tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.refresh_fitted()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # By way of its state dict a moving average is written, and saved.
        self._follow_original()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KernelHash:
        def apply_in_full(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            is_flag = tensor.dtype == torch.bool
            if is_flag and tensor.is_meta and not result.is_meta:
                # Memory that nobody has written yet could say anything.
                return torch.full_like(result, self._is_fitted)
            dtype = torch.bool if is_flag else compute_dtype(result)
            # From what was there, not from what is rounded already.
            return result if result.dtype == dtype else tensor.to(result.device, dtype)

        super()._apply(apply_in_full, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_original", "_seen")}

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelHash:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._original = weakref.ref(self)
        twin._look()
        return twin

    def _look(self) -> None:
        """Remember the flag as it is now."""
        self._seen = self.is_fitted, _count_writes(self.is_fitted)

    def _follow_flag(self) -> None:
        """Read the flag where it was written, or another one is in its place.

        As ``copy_`` and ``torch.func.functional_call`` do, and DistributedDataParallel in every
        step unless its ``broadcast_buffers`` is off. Nothing waits for the device otherwise.
        """
        seen, num_writes = self._seen or (None, None)
        if self.is_fitted is seen and _count_writes(seen) == num_writes:
            return
        # One of many models, or of a shape without data, cannot be read.
        with suppress(RuntimeError):
            self.refresh_fitted()

    @torch.no_grad()
    def _follow_original(self) -> None:
        """Take the functions of the original whole where others have mixed them with older ones.

        Nothing waits for the device.
        """
        original = None if self._original is None else self._original()
        seen, num_writes = self._seen or (None, None)
        # A tensor that was put in place of the flag, by a move to a device, say, is no mixture.
        is_written = self.is_fitted is seen and _count_writes(seen) != num_writes
        if original is None or not original._is_fitted or not is_written:
            return
        # Whole functions of another fit were put there on purpose, as by a broadcast.
        distance = (original.anchors.to(self.anchors) - self.anchors).abs().amax()
        is_own = (find_shortfall(self.anchors) < _MAX_SHORTFALL) & (distance > _MAX_DRIFT)
        for name in _FUNCTIONS:
            buffer = getattr(self, name)
            buffer.copy_(torch.where(is_own, buffer, getattr(original, name).to(buffer)))
        self.is_fitted.fill_(True)
        self._is_fitted = True
        self._look()


def _count_writes(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def find_shortfall(anchors: Tensor) -> Tensor:
    """How far from unit length a row of [H, M, D] is at most, []."""
    return (anchors.float().norm(dim=-1) - 1).abs().amax()


def read_flag(flag: Tensor, anchors: Tensor | None, owner: str) -> Tensor:
    """``is_fitted`` of a state dict as bool; whoever averages checkpoints makes a float of it.

    Raises:
        InputError: fitted functions were averaged with others, or with unfitted ones. ``owner`` is
            what the message calls them.
    """
    if not flag.is_floating_point() or flag.numel() != 1:
        return flag
    if flag not in (0, 1):
        raise InputError(
            f"{owner}: fitted hash functions averaged with unfitted ones; average checkpoints that "
            "were all written after the fit."
        )
    # Without anchors the state dict is refused elsewhere.
    anchors = torch.zeros(0) if anchors is None else anchors
    if flag and anchors.numel() and find_shortfall(anchors) > _MAX_SHORTFALL_IN_FILE:
        raise InputError(
            f"{owner}: hash functions of different fits were averaged, which gives none; average "
            "checkpoints between two fits."
        )
    return flag.bool()
