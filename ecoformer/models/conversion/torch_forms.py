"""Softmax attention of PyTorch's own encoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ecoformer.attention import Derived
from ecoformer.errors import InputError
from ecoformer.models.conversion.forms import (
    Call,
    Form,
    Parts,
    keep_same,
    read_key_mask,
    register_form,
)

# Of modules that give their MultiheadAttention one input, for queries, keys and values.
_ENCODERS = ("TransformerEncoderLayer", "EncoderBlock")


def _take_third(place: int, entry: str) -> Derived:
    return Derived((entry,), lambda joined: joined.tensor_split(3)[place], (f"{entry}[k]",))


@register_form
class TorchMultihead(Form):
    """``MultiheadAttention`` in ``TransformerEncoderLayer``, batch first or not.

    Where weights of the map are asked for, None is returned in their place: codes have no map.
    """

    classes = ("torch.nn.modules.activation.MultiheadAttention",)
    derived = {  # noqa: RUF012
        "to_qk.weight": _take_third(0, "in_proj_weight"),
        "to_qk.bias": _take_third(0, "in_proj_bias"),
        "to_v.weight": _take_third(2, "in_proj_weight"),
        "to_v.bias": _take_third(2, "in_proj_bias"),
        "proj": Derived(("out_proj",), keep_same),
    }

    def find_obstacle(self, layer: Any, holders: Sequence[nn.Module]) -> str | None:
        if any("Decoder" in type(holder).__name__ for holder in holders):
            return "a decoder's attention is causal, or looks at an encoder"
        if not layer._qkv_same_embed_dim:
            return "its keys or values have a width of their own: cross-attention"
        if layer.bias_k is not None or layer.add_zero_attn:
            return "it adds keys that are no tokens"
        return None

    def find_doubt(self, holders: Sequence[nn.Module]) -> str | None:
        if type(holders[-1]).__name__ in _ENCODERS:
            return None
        return (
            "only its caller knows whether queries, keys and values are one input; "
            "name it in select if so"
        )

    def take(self, layer: Any) -> Parts:
        # Encoder layers ask for these before they take a fast path past the layer: not here.
        attributes = {"batch_first": layer.batch_first, "embed_dim": layer.embed_dim}
        attributes |= {"in_proj_bias": None, "_qkv_same_embed_dim": False}
        return Parts(layer.num_heads, layer.out_proj, attributes=attributes)

    def settle(self, holders: Sequence[nn.Module]) -> None:
        for holder in holders:
            if isinstance(holder, nn.TransformerEncoder):
                # It would hand its layers nested tensors instead of a mask.
                holder.use_nested_tensor = False

    def read(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Call:
        if not query is key is value:
            raise InputError(
                "an EcoFormer layer takes one input for queries, keys and values; for "
                "cross-attention keep the softmax layer (select=)."
            )
        if query.is_nested:
            raise InputError("an EcoFormer layer takes padded inputs and a mask, not nested ones.")
        x = query.unsqueeze(0 if layer.batch_first else 1) if query.ndim == 2 else query
        x = x if layer.batch_first else x.transpose(0, 1)
        key_mask: Tensor | None = None
        # PyTorch's masks of this layer are true where a key is hidden.
        if key_padding_mask is not None and key_padding_mask.shape[-1] != x.shape[1]:
            raise InputError(
                f"a padding mask {list(key_padding_mask.shape)} does not fit {x.shape[0]} inputs "
                f"of {x.shape[1]} tokens; give one of {list(x.shape[:2])}."
            )
        for mask, shape in (
            (key_padding_mask, (-1, 1, 1, x.shape[1])),
            (attn_mask, (-1, layer.num_heads, x.shape[1], x.shape[1])),
        ):
            if mask is None:
                continue
            if mask is key_padding_mask or mask.ndim == 3:
                mask = mask.reshape(shape)
            seen = read_key_mask(mask if mask.is_floating_point() else ~mask.bool(), x)
            assert seen is not None
            key_mask = seen if key_mask is None else key_mask & seen
        # A causal mask comes with its hint, or is seen to be one; without, the hint hides nothing.
        if is_causal and attn_mask is None:
            read_key_mask(None, x, is_causal=True)
        return Call(x, key_mask, shape=query.shape)

    def answer(self, layer: Any, out: Tensor, call: Call) -> tuple[Tensor, None]:
        assert call.shape is not None
        return (out if layer.batch_first else out.transpose(0, 1)).reshape(call.shape), None
