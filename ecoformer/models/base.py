"""What all backbones stand on: patch embedding, blocks, and a classifier over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from typing import Any

import torch
from einops import rearrange
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ecoformer.attention import LayerSpec, attention_class
from ecoformer.attention.base import Size
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig


@register_notrace_module
class PatchEmbed(nn.Module):
    """Strided convolution to tokens, then LayerNorm: [B, in_chans, height, width] to [B, N, C].

    Patches overlap where ``kernel_size`` exceeds ``stride``.

    Source: ViT, arXiv 2010.11929; overlapping form: PVTv2, arXiv 2106.13797.
    """

    def __init__(
        self, in_chans: int, embed_dim: int, *, kernel_size: int, stride: int, padding: int = 0
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.min_side = kernel_size - 2 * padding

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """Tokens and their (height, width). A map smaller than one patch is an InputError."""
        if min(x.shape[-2:]) < self.min_side:
            raise InputError(
                f"a map of {x.shape[-2]} x {x.shape[-1]} is smaller than a patch; "
                "give images of at least 32 pixels a side."
            )
        x = self.proj(x)
        return self.norm(rearrange(x, "b c h w -> b (h w) c")), (x.shape[-2], x.shape[-1])


@register_notrace_module
class Block(nn.Module):
    """Pre-norm transformer block (ViT, arXiv 2010.11929), [B, N, C] to [B, N, C].

    Attention that takes a ``key_mask``, [B, N], true for a real token, gets it from the call.

    ``drop_path`` is the probability that a sample skips a branch in training. Where
    ``grad_checkpointing`` is set, gradients compute the block again instead of keeping its insides.
    """

    def __init__(
        self, dim: int, attention: nn.Module, mlp: nn.Module, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp

    def forward(
        self, x: Tensor, size: Size | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            # Not the reentrant form, which DistributedDataParallel does not take. The state of the
            # random generators is kept: what was dropped is dropped again.
            x = checkpoint(self._add_branches, x, size, key_mask, use_reentrant=False)
            return x
        return self._add_branches(x, size, key_mask)

    def _add_branches(self, x: Tensor, size: Size | None, key_mask: Tensor | None) -> Tensor:
        # Not every attention knows masks.
        masks = () if key_mask is None else (key_mask,)
        x = x + self.drop_path(self.attn(self.norm1(x), size, *masks))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


def build_blocks(
    kinds: Sequence[str],
    spec: LayerSpec,
    make_mlp: Callable[[], nn.Module],
    drop_paths: Sequence[float],
) -> nn.ModuleList:
    """Build a block for each rate of ``drop_paths``; they take the attention kinds in turn."""
    blocks = nn.ModuleList()
    for kind, drop_path in zip(cycle(kinds), drop_paths, strict=False):
        attention = attention_class(kind).from_spec(spec)
        blocks.append(Block(spec.dim, attention, make_mlp(), drop_path))
    return blocks


def spread_drop_path(rate: float, depth: int) -> list[float]:
    """Rates of stochastic depth (arXiv 1603.09382), which rise linearly from 0 to ``rate``."""
    if not 0 <= rate < 1:
        raise InputError(f"drop path is a probability below 1, not {rate}.")
    # On the CPU also where a model is built without data: these are numbers, not weights.
    return torch.linspace(0, rate, depth, device="cpu").tolist()


class Backbone(nn.Module):
    """A classifier over tokens, with the methods that timm asks for.

    A subclass calls ``super().__init__`` with the C of its last tokens, builds its layers, calls
    ``init_weights`` and defines ``forward_features``. Without classes the mean token comes out,
    and without pooling, ``global_pool=""``, what ``forward_features`` gives.

    ``drop_rate`` is dropout before the classifier.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = num_features
        self.in_chans = in_chans
        self.reset_classifier(num_classes, global_pool)
        self.head_drop = nn.Dropout(drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] to normalised tokens [B, N, C]."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """Mean of what ``forward_features`` gives, [B, C]."""
        return x.mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool what ``forward_features`` gives, then the classifier unless ``pre_logits``."""
        if self.global_pool:
            x = self.pool(x)
        elif self.num_classes and not pre_logits:
            raise InputError("the classifier needs pooled features; set global_pool='avg'.")
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a freshly drawn classifier in place; 0 classes remove it.

        ``global_pool``, ``"avg"`` or ``""``, stays as it is where None.
        """
        if global_pool not in ("avg", "", None):
            raise InputError(f"global_pool is 'avg' or '', not {global_pool!r}.")
        if global_pool is not None:
            self.global_pool = global_pool
        like = next(self.parameters(), torch.empty(0))
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes)
            init_layer(self.head)
            self.head.to(like).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep of each block no more than its input for gradients, which then run it again."""
        for module in self.modules():
            if isinstance(module, Block):
                module.grad_checkpointing = enable

    @property
    def _model_args(self) -> dict[str, Any]:
        """The keywords that timm made it of, and writes as JSON beside shared weights."""
        args: dict[str, Any] = vars(self).get("_timm_args", {})
        return args

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        self._timm_args = {
            name: asdict(value) if isinstance(value, HashConfig) else value
            for name, value in args.items()
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beside biases and other 1-D ones."""
        return set()

    def init_weights(self) -> None:
        """Draw all weights by ``init_layer``."""
        self.apply(init_layer)


def init_layer(layer: nn.Module) -> None:
    """Draw weights: truncated normal for linear, by fan-out for convolution."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
    elif isinstance(layer, nn.Conv2d):
        fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
        nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_out))
    if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
