"""Softmax attention as timm writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from einops import rearrange
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from ecoformer.attention import Derived
from ecoformer.attention.softmax import SHARED_FROM_SOFTMAX
from ecoformer.models.conversion.forms import (
    KEPT,
    Call,
    Form,
    keep_same,
    read_key_mask,
    register_form,
)

_WINDOWS = "it attends in windows"
_POOLED_QUERIES = "its queries are pooled: fewer than its keys"
_REDUCED = "its keys are a reduced map of the tokens"
_BIAS = "a bias of positions is added inside the softmax"
_ONE_QUERY = "only a class token asks"
_CROSS = "its queries and keys come from different inputs: cross-attention"
_CHANNELS = "it attends to channels, and is linear in tokens"
_CONVOLUTIONS = "its projections are more than linear: convolutions and norms"

KEPT |= {
    f"timm.{name}": reason
    for reason, names in {
        _BIAS: (
            "layers.bottleneck_attn.BottleneckAttn",
            "models.beit.Attention",
            "models.convit.GPSA",
            "models.efficientformer.Attention",
            "models.efficientformer_v2.Attention2d",
            "models.levit.Attention",
            "models.maxxvit.Attention2d",
            "models.mvitv2.MultiScaleAttention",
            "models.vision_transformer_relpos.RelPosAttention",
            "models.vision_transformer_sam.Attention",
        ),
        _WINDOWS: (
            "layers.halo_attn.HaloAttn",
            "models.davit.WindowAttention",
            "models.efficientvit_msra.CascadedGroupAttention",
            "models.gcvit.WindowAttentionGlobal",
            "models.maxxvit.AttentionCl",
            "models.nest.Attention",
            "models.swin_transformer.WindowAttention",
            "models.swin_transformer_v2.WindowAttention",
            "models.swin_transformer_v2_cr.WindowMultiHeadAttention",
            "models.tiny_vit.Attention",
            "models.twins.LocallyGroupedAttn",
            "models.volo.OutlookAttention",
        ),
        _POOLED_QUERIES: (
            "models.efficientformer_v2.Attention2dDownsample",
            "models.levit.AttentionDownsample",
        ),
        _ONE_QUERY: (
            "layers.attention_pool.AttentionPoolLatent",
            "layers.attention_pool.AttentionPoolPrr",
            "layers.attention_pool2d.AttentionPool2d",
            "layers.attention_pool2d.RotAttentionPool2d",
            "models.cait.ClassAttn",
            "models.volo.ClassAttention",
        ),
        _CROSS: ("models.crossvit.CrossAttention",),
        _CHANNELS: (
            "models.davit.ChannelAttention",
            "models.davit.ChannelAttentionV2",
            "models.edgenext.CrossCovarianceAttn",
            "models.xcit.XCA",
        ),
        _CONVOLUTIONS: (
            "models.cpubone.ConvAttention",
            "models.iformer.SHMA",
            "models.lowformer.ConvAttention",
            "models.shvit.SHSA",
        ),
        "its heads are mixed inside the softmax: talking heads": ("models.cait.TalkingHeadAttn",),
        "it subtracts one softmax from another": (
            "layers.diff_attention.DiffAttention",
            "models.vision_transformer.DiffParallelScalingBlock",
        ),
        "queries, keys, values and MLP have one projection": (
            "models.vision_transformer.ParallelScalingBlock",
        ),
        "its query heads share their keys": ("layers.attention2d.MultiQueryAttention2d",),
        "it weighs channels or places, and is no attention between tokens": (
            "layers.non_local_attn.BilinearAttnTransform",
            "layers.selective_kernel.SelectiveKernelAttn",
            "layers.split_attn.SplitAttn",
            "models.csatv2.SpatialAttention",
            "models.nextvit.ConvAttention",
        ),
        "it is linear in tokens already": (
            "layers.lambda_layer.LambdaLayer",
            "models.coat.FactorAttnConvRelPosEnc",
            "models.mobilevit.LinearSelfAttention",
            "models.swiftformer.EfficientAdditiveAttention",
        ),
    }.items()
    for name in names
}


def _flatten_after(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a weight [A, C] of that of a convolution, [3 A, C, 1, 1]; a bias stays [A]."""
    return lambda joined: make(joined.flatten(1) if joined.ndim > 1 else joined)


_BIAS_APART = {
    **SHARED_FROM_SOFTMAX,
    "to_qk.bias": Derived(("q_bias",), keep_same),
    "to_v.bias": Derived(("v_bias",), keep_same),
}
_FROM_SPLIT = {
    "to_qk": Derived(("q_proj",), keep_same, leaves_out=("k_proj",)),
    "to_v": Derived(("v_proj",), keep_same, leaves_out=("k_proj",)),
}

_FROM_KV = {
    "to_qk": Derived(("q",), keep_same),
    "to_v": Derived(("kv",), lambda kv: kv.tensor_split(2)[1], leaves_out=("kv[k]",)),
}
_FROM_Q_K_V = {
    "to_qk": Derived(("q",), keep_same, leaves_out=("k",)),
    "to_v": Derived(("v",), keep_same, leaves_out=("k",)),
}
_FROM_QK = {
    "to_qk": Derived(("qk",), lambda qk: qk.tensor_split(2)[0], leaves_out=("qk[k]",)),
    "to_v": Derived(("v",), keep_same),
}
_FROM_CONVOLUTION = {
    name: Derived(rule.sources, _flatten_after(rule.make), rule.leaves_out)
    for name, rule in SHARED_FROM_SOFTMAX.items()
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
    derived = _FROM_SPLIT


@register_form
class TimmPlain(Form):
    """CAFormer, the later layers of ConViT, and the global ones of Hiera."""

    classes = (
        "timm.models.metaformer.Attention",
        "timm.models.hiera.MaskUnitAttention",
        "timm.models.convit.MHSA",
    )

    def find_obstacle(self, layer: Any, holders: object) -> str | None:
        if getattr(layer, "use_mask_unit_attn", False):
            return _WINDOWS
        return _POOLED_QUERIES if getattr(layer, "q_stride", 1) > 1 else None


@register_form
class TimmTnt(Form):
    """TNT, pixels of a patch and patches; queries and keys have one projection, values another."""

    classes = ("timm.models.tnt.Attention",)
    derived = _FROM_QK


@register_form
class TimmReducible(Form):
    """PVTv2, Twins and Next-ViT, where their layers do not reduce the map of keys."""

    classes: ClassVar[tuple[str, ...]] = (
        "timm.models.pvt_v2.Attention",
        "timm.models.twins.GlobalSubSampleAttn",
    )
    derived = _FROM_KV

    def find_obstacle(self, layer: Any, holders: object) -> str | None:
        is_reducing = layer.sr is not None or getattr(layer, "pool", None) is not None
        return _REDUCED if is_reducing else None

    def read(self, layer: Any, x: Tensor, *size: object, **sizes: object) -> Call:
        return Call(x)


@register_form
class TimmReducibleSplit(TimmReducible):
    """The same with a projection each."""

    classes = ("timm.models.nextvit.EfficientAttention",)
    derived = _FROM_Q_K_V


@register_form
class TimmMap(Form):
    """Layers that take maps, channels last: VOLO, and the global layers of SAM 2's HieraDet."""

    classes = ("timm.models.volo.Attention", "timm.models.hieradet_sam2.MultiScaleAttention")
    layout = "b h w c"

    def find_obstacle(self, layer: Any, holders: Any) -> str | None:
        if any(getattr(block, "is_windowed", False) for block in holders[-1:]):
            return _WINDOWS
        return _POOLED_QUERIES if getattr(layer, "q_pool", None) is not None else None


@register_form
class TimmChannelsFirst(Form):
    """FastViT: maps with channels first, between linear projections."""

    classes = ("timm.models.fastvit.Attention",)
    layout = "b c h w"


@register_form
class TimmConvolved(Form):
    """Visformer: maps between convolutions of 1 x 1."""

    classes = ("timm.models.visformer.Attention",)
    derived = _FROM_CONVOLUTION
    layout = "b c h w"

    def project(self, layer: Any, heads: Tensor, call: Call) -> Tensor:
        # A map of one row.
        out = layer.proj(rearrange(heads, "b n c -> b c 1 n"))
        return rearrange(out, "b c 1 n -> b n c")
