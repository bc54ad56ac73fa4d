"""The layer that softmax attention of any form is converted to.

Letters: B batch, H heads, N tokens, D head dim, C channels of a token, A = H * D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ecoformer.attention import Derived, EcoFormerAttention
from ecoformer.attention.base import Size
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import KernelHash
from ecoformer.models.conversion.forms import FORMS, Call, Form, find_num_heads, name_class

# A head of more channels has no kernel, and no published one.
_MAX_HEAD_DIM = 128
_PROJECTIONS = ("to_qk", "to_v")
# What a weight of these says is all that they do.
_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@register_notrace_module
class ConvertedAttention(EcoFormerAttention):
    """EcoFormer attention in the place of a softmax layer, called as that one was.

    What acted on queries acts on the rows that queries and keys share: ``q_norm``, and rotary
    positions before the hash. ``norm`` and ``gate`` stay between the heads and ``proj``.

    Args:
        layer: softmax attention of this form. Weights of queries and values are copied; modules
            that stay are taken over as they are.
    """

    # Whatever modules did these of the softmax layer.
    proj: nn.Module  # type: ignore[assignment]
    proj_drop: nn.Module  # type: ignore[assignment]

    def __init__(self, form: Form, layer: nn.Module, hashing: HashConfig) -> None:
        to_qk, to_v = (_make_projection(form, layer, name) for name in _PROJECTIONS)
        parts = form.take(layer)
        # Past the parent's, which draws projections of its own.
        super(EcoFormerAttention, self).__init__(to_qk.out_features, parts.num_heads)
        self.form_name = form.name
        self.to_qk, self.to_v = to_qk, to_v
        with to_qk.weight.device:
            self.hash = KernelHash(self.num_heads, self.head_dim, hashing)
        self.train(layer.training)
        self.q_norm, self.norm, self.gate = parts.q_norm, parts.norm, parts.gate
        self.proj, self.proj_drop = parts.proj, parts.proj_drop
        # What other code asks a softmax layer for.
        for name, value in parts.attributes.items():
            setattr(self, name, value)

    @property
    def form(self) -> Form:
        return FORMS[self.form_name]

    @property
    def derived(self) -> Mapping[str, Derived]:  # type: ignore[override]
        return self.form.derived

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Attend; arguments and results are those of the softmax layer.

        Raises:
            InputError: an argument that codes cannot obey, as a mask of other than padding, or
                hash functions that are not fitted.
        """
        call = self.form.read(self, *args, **keywords)
        if call.key_mask is None:
            return self.form.answer(self, self._compute(call), call)
        is_masked = ~call.key_mask.unsqueeze(-1)
        out = self._compute(call._replace(x=call.x.masked_fill(is_masked, 0)))
        return self.form.answer(self, out.masked_fill(is_masked, 0), call)

    def _compute(self, call: Call) -> Tensor:
        heads = self.attend(call.x, None, call.key_mask, call.position)
        return self.proj_drop(self.form.project(self, heads, call))

    def count_call(
        self, args: Sequence[Any], keywords: Mapping[str, Any], out: Any
    ) -> tuple[int, int]:
        num_rows, num_tokens, _ = self.form.read(self, *args, **keywords).x.shape
        mul, add = self.count_attention(num_tokens)
        return num_rows * mul, num_rows * add

    def attend(
        self, x: Tensor, size: Size | None, key_mask: Tensor | None = None, position: Any = None
    ) -> Tensor:
        q, v = self.split_heads(self.to_qk(x), self.to_v(x))
        q = self.q_norm(q)
        if position is not None:
            q = self.form.rotate(self, q, position)
        heads = self.hash(q, v, key_mask)
        out: Tensor = self.norm(rearrange(heads, "b h n d -> b n (h d)"))
        return out if self.gate is None else out * self.gate(x).sigmoid()


# Tables call it what it computes.
ConvertedAttention.kind = EcoFormerAttention.kind


def find_misfit(form: Form, layer: nn.Module) -> str | None:
    """Say what of a layer, of a form that can be converted, could not be taken over."""
    for name, module in [("", layer), *_list_sources(form, layer).items()]:
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return "hooks watch it and would be lost: attach them after the conversion"
        if name and (type(module).forward not in _PLAIN_FORWARDS or is_parametrized(module)):
            return f"its projection {name}, {name_class(module)}, is no plain linear layer"
    shapes = [_derive(form, layer, f"{name}.weight", device="meta") for name in _PROJECTIONS]
    num_channels, num_values = (0 if weight is None else len(weight) for weight in shapes)
    num_heads = find_num_heads(layer)
    if not num_channels or not num_values:
        return "its projections are not those of its class"
    if num_channels != num_values or num_channels % num_heads:
        return f"its queries have {num_channels} channels, its values {num_values}"
    if num_channels // num_heads > _MAX_HEAD_DIM:
        return f"its heads have {num_channels // num_heads} channels, more than {_MAX_HEAD_DIM}"
    return None


def _list_sources(form: Form, layer: nn.Module) -> dict[str, nn.Module]:
    """Modules of a layer that hold the weights of queries and values."""
    children = dict(layer.named_modules())
    names = [source for rule in form.derived.values() for source in rule.sources]
    return {name: children[name] for name in names if name in children}


def _make_projection(form: Form, layer: nn.Module, name: str) -> nn.Linear:
    weight, bias = (_derive(form, layer, f"{name}.{leaf}") for leaf in ("weight", "bias"))
    assert weight is not None
    # On a device without data nothing is drawn, and no generator moves on.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


def _derive(
    form: Form, layer: nn.Module, entry: str, device: str | None = None
) -> nn.Parameter | None:
    """Copy what the form's rule makes of a layer's parameters; None where they are not there."""
    name, _, leaf = entry.rpartition(".")
    rule = form.derived.get(entry)
    sources = rule.sources if rule else [f"{part}.{leaf}" for part in form.derived[name].sources]
    parameters = dict(layer.named_parameters())
    if any(source not in parameters for source in sources):
        return None
    found = [parameters[source] for source in sources]
    with torch.no_grad():
        made = (rule or form.derived[name]).make(*(p.to(device) for p in found))
        # Not a view of a larger one, which would be saved whole.
        made = made.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(made, requires_grad=any(p.requires_grad for p in found))
