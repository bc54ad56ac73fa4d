"""Softmax attention as the library transformers writes it, which need not be installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ecoformer.attention import Derived
from ecoformer.errors import InputError
from ecoformer.models.conversion.forms import (
    KEPT,
    Call,
    Form,
    Parts,
    find_num_heads,
    keep_same,
    read_key_mask,
    register_form,
)


def _name_classes(**models: str) -> tuple[str, ...]:
    """Full names of classes, of one a model, each in the module that transformers has for it."""
    return tuple(
        f"transformers.models.{model}.modeling_{model}.{name}" for model, name in models.items()
    )


def _derive(query: str, key: str, value: str, proj: str | None = None) -> dict[str, Derived]:
    rules = {
        "to_qk": Derived((query,), keep_same, leaves_out=(key,)),
        "to_v": Derived((value,), keep_same, leaves_out=(key,)),
    }
    return rules if proj is None else rules | {"proj": Derived((proj,), keep_same)}


class _Transformers(Form):
    """Attention that gets a mask of padding, and returns its output and the map, here None."""

    def find_obstacle(self, layer: Any, holders: object) -> str | None:
        config = getattr(layer, "config", None)
        # The text tower of CLIP has the class of its image tower.
        is_causal = layer.is_causal or type(config).__name__ == "CLIPTextConfig"
        return "it is causal" if is_causal else None

    def take(self, layer: Any) -> Parts:
        parts = Parts(find_num_heads(layer))
        if "proj" in self.derived:
            (name,) = self.derived["proj"].sources
            parts.proj = layer.get_submodule(name)
        return parts

    def read(
        self,
        layer: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **keywords: Any,
    ) -> Call:
        for name in ("cache", "past_key_values", "encoder_hidden_states", "key_value_states"):
            if keywords.get(name) is not None:
                raise InputError(f"an EcoFormer layer sees all tokens of one input, and no {name}.")
        mask = attention_mask
        if mask is not None and not isinstance(mask, Tensor):
            raise InputError(
                f"an EcoFormer layer takes no mask of type {type(mask).__name__}; choose "
                "attn_implementation='sdpa'."
            )
        if mask is not None and mask.ndim == 2:
            # [B, N], for kernels that know nothing but padding.
            mask = mask[:, None, None].bool()
        is_causal = bool(keywords.get("is_causal"))
        return Call(hidden_states, read_key_mask(mask, hidden_states, is_causal=is_causal))

    def answer(self, layer: Any, out: Tensor, call: Call) -> tuple[Tensor, None]:
        return out, None


@register_form
class TransformersViT(_Transformers):
    """ViT, DeiT, DINOv2, and those that copy their layer."""

    classes = _name_classes(
        vit="ViTAttention",
        deit="DeiTAttention",
        dinov2="Dinov2Attention",
        dinov2_with_registers="Dinov2WithRegistersAttention",
        ijepa="IJepaAttention",
        vit_mae="ViTMAEAttention",
        vit_msn="ViTMSNAttention",
        vivit="VivitAttention",
        audio_spectrogram_transformer="ASTAttention",
    )
    derived = _derive("q_proj", "k_proj", "v_proj", "o_proj")


@register_form
class TransformersClip(_Transformers):
    """Image towers of CLIP, and both towers of SigLIP."""

    classes = _name_classes(
        clip="CLIPAttention", siglip="SiglipAttention", siglip2="Siglip2Attention"
    )
    derived = _derive("q_proj", "k_proj", "v_proj", "out_proj")


@register_form
class TransformersBert(_Transformers):
    """BERT and its kin; the output projection stands outside, in the module that follows."""

    classes = _name_classes(
        bert="BertSelfAttention",
        roberta="RobertaSelfAttention",
        electra="ElectraSelfAttention",
        xlm_roberta="XLMRobertaSelfAttention",
        xlm_roberta_xl="XLMRobertaXLSelfAttention",
        camembert="CamembertSelfAttention",
        ernie="ErnieSelfAttention",
        roberta_prelayernorm="RobertaPreLayerNormSelfAttention",
        layoutlm="LayoutLMSelfAttention",
        splinter="SplinterSelfAttention",
    )
    derived = _derive("query", "key", "value")


@register_form
class TransformersDistilBert(_Transformers):
    """DistilBERT."""

    classes = _name_classes(distilbert="DistilBertSelfAttention")
    derived = _derive("q_lin", "k_lin", "v_lin", "out_lin")


@register_form
class TransformersDinov3(_Transformers):
    """DINOv3, with rotary positions."""

    classes = _name_classes(dinov3_vit="DINOv3ViTAttention")
    derived = _derive("q_proj", "k_proj", "v_proj", "o_proj")

    def read(
        self,
        layer: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **keywords: Any,
    ) -> Call:
        call = super().read(layer, hidden_states, attention_mask, **keywords)
        return call._replace(position=position_embeddings)

    def rotate(self, layer: Any, q: Tensor, position: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = position
        # Class and register tokens come first, and have no position.
        prefix, patches = q.tensor_split((q.shape[-2] - cos.shape[-2],), dim=2)
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat([-second, first], -1)
        return torch.cat([prefix, patches * cos + turned * sin], 2)


KEPT |= dict.fromkeys(
    _name_classes(albert="AlbertAttention"), "one layer is called again and again, at every depth"
)
