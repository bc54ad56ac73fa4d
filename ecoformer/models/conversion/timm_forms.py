"""Softmax attention as timm writes it."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from ecoformer.attention import Derived
from ecoformer.attention.softmax import SHARED_FROM_SOFTMAX
from ecoformer.models.conversion.forms import (
    Call,
    Form,
    keep_same,
    read_key_mask,
    register_form,
)

_BIAS_APART = {
    **SHARED_FROM_SOFTMAX,
    "to_qk.bias": Derived(("q_bias",), keep_same),
    "to_v.bias": Derived(("v_bias",), keep_same),
}
_SPLIT = {
    "to_qk": Derived(("q_proj",), keep_same, leaves_out=("k_proj",)),
    "to_v": Derived(("v_proj",), keep_same, leaves_out=("k_proj",)),
}


@register_form
class TimmViT(Form):
    """ViT, DeiT, DeiT-III, DINOv2, CLIP and SigLIP towers, and all that borrow their layer."""

    classes = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")

    def read(
        self, layer: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Call:
        return Call(x, read_key_mask(attn_mask, x, is_causal=is_causal))


class _Rotary(Form):
    """Rotary positions, sine and cosine in one tensor; prefix tokens have none."""

    def find_obstacle(self, layer: Any, holders: object) -> str | None:
        if getattr(layer, "num_kv_heads", layer.num_heads) != layer.num_heads:
            return f"it has {layer.num_kv_heads} key heads for {layer.num_heads} query heads"
        return None

    def take(self, layer: Any) -> Any:
        parts = super().take(layer)
        names = ("num_prefix_tokens", "rotate_half")
        parts.attributes = {name: getattr(layer, name, False) for name in names}
        return parts

    def read(
        self,
        layer: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Call:
        return Call(x, read_key_mask(attn_mask, x, is_causal=is_causal), rope)

    def rotate(self, layer: Any, q: Tensor, position: Tensor) -> Tensor:
        prefix, patches = q.tensor_split((layer.num_prefix_tokens,), dim=2)
        # timm's older ones know no other order of channels.
        order = {"half": True} if layer.rotate_half else {}
        return torch.cat([prefix, apply_rot_embed_cat(patches, position, **order)], 2).type_as(q)


@register_form
class TimmRotary(_Rotary):
    """ViTs with rotary positions, among them EVA-02 of larger sizes and perception encoders."""

    classes = ("timm.layers.attention.AttentionRope",)
    marks = ("qkv",)


@register_form
class TimmEva(_Rotary):
    """EVA; the bias of queries and values is no part of their projection."""

    classes = ("timm.models.eva.EvaAttention",)
    marks = ("qkv",)
    derived = _BIAS_APART


@register_form
class TimmSplitRotary(_Rotary):
    """Both of them with a projection each for queries, keys and values, as in EVA-02."""

    classes = ("timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention")
    marks = ("q_proj", "k_proj", "v_proj")
    derived = _SPLIT
