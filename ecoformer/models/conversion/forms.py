"""What a form of softmax attention is: how it is called, and what a converted layer takes of it.

Letters: B batch, H heads, N tokens, D head dim, C channels of a token, A = H * D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ecoformer.attention import Derived, MultiHeadAttention
from ecoformer.attention.softmax import SHARED_FROM_SOFTMAX
from ecoformer.errors import InputError


class Call(NamedTuple):
    """What a layer is called with."""

    x: Tensor  # [B, N, C]
    key_mask: Tensor | None = None  # [B, N], bool, true for a real token
    # Of rotary positions, as the form takes it.
    position: Any = None
    # Of the input, where it is a map.
    shape: torch.Size | None = None


@dataclass
class Parts:
    """What a converted layer keeps of the softmax layer, as it is; ``proj`` takes A channels."""

    num_heads: int
    proj: nn.Module = field(default_factory=nn.Identity)
    proj_drop: nn.Module = field(default_factory=nn.Identity)
    # On rows of D channels.
    q_norm: nn.Module = field(default_factory=nn.Identity)
    # On A channels, before ``gate``, of the layer's input, and ``proj``.
    norm: nn.Module = field(default_factory=nn.Identity)
    gate: nn.Module | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Form:
    """One way in which libraries write softmax self-attention.

    A class of ``FORMS``; instances hold nothing, and a converted layer remembers its form by name.

    Attributes:
        classes: full names of the modules written so; libraries need not be there.
        derived: where ``to_qk`` and ``to_v`` come from, by module or by entry of the state dict;
            also of ``proj`` where its name is another.
        marks: what a layer of these classes has beside, to be written so.
        layout: axes of input and output, in einops's words.
    """

    classes: ClassVar[tuple[str, ...]]
    marks: ClassVar[tuple[str, ...]] = ()
    derived: ClassVar[Mapping[str, Derived]] = SHARED_FROM_SOFTMAX
    layout: ClassVar[str] = "b n c"

    @property
    def name(self) -> str:
        return type(self).__name__

    def find_obstacle(self, layer: nn.Module, holders: Sequence[nn.Module]) -> str | None:
        """Say why this layer has no linear form, if so; ``holders`` are around it, nearest last."""
        return None

    def find_doubt(self, holders: Sequence[nn.Module]) -> str | None:
        """Say why a layer is left as it is unless it is named."""
        return None

    def settle(self, holders: Sequence[nn.Module]) -> None:
        """Tell the modules around a layer that it was converted."""

    def take(self, layer: nn.Module) -> Parts:
        """Take the parts as timm calls them."""
        names = ("proj", "proj_drop", "q_norm", "norm", "gate")
        found = {name: part for name in names if (part := getattr(layer, name, None)) is not None}
        return Parts(find_num_heads(layer), **found)

    def read(self, layer: Any, *args: Any, **keywords: Any) -> Call:
        """Understand the arguments of ``forward``; what cannot be obeyed is an InputError."""
        return self._read_input(*args, **keywords)

    def _read_input(self, x: Tensor) -> Call:
        if self.layout == "b n c":
            return Call(x)
        return Call(rearrange(x, f"{self.layout} -> b (h w) c"), shape=x.shape)

    def rotate(self, layer: Any, q: Tensor, position: Any) -> Tensor:
        """Turn rows [B, H, N, D] by their positions."""
        raise AssertionError(f"{self.name} has no rotary positions")

    def project(self, layer: Any, heads: Tensor, call: Call) -> Tensor:
        """Project what heads found, [B, N, A], to [B, N, C]."""
        out: Tensor = layer.proj(heads)
        return out

    def answer(self, layer: Any, out: Tensor, call: Call) -> Any:
        """Return [B, N, C] as the softmax layer does."""
        if call.shape is None:
            return out
        sizes = dict(zip(self.layout.split(), call.shape, strict=True))
        return rearrange(out, f"b (h w) c -> {self.layout}", h=sizes["h"], w=sizes["w"])


# By name, in the order in which they are looked for.
FORMS: dict[str, Form] = {}
# Full name of a class -> why its layers are left as they are.
KEPT: dict[str, str] = {}


def register_form(cls: type[Form]) -> type[Form]:
    """Add a form to the table."""
    FORMS[cls.__name__] = cls()
    return cls


def find_form(layer: nn.Module) -> Form | None:
    """Find how a layer is written, if that is in the table. A subclass may compute otherwise."""
    # A forward that was put in its place is another one.
    name = "" if "forward" in vars(layer) else name_class(layer)
    for form in FORMS.values():
        if name in form.classes and all(getattr(layer, m, None) is not None for m in form.marks):
            return form
    return None


def find_kept(layer: nn.Module) -> str | None:
    """Say why a layer of a known class stays as it is."""
    if isinstance(layer, MultiHeadAttention):
        return "a kind of ours: build the model with attention='ecoformer' instead"
    return KEPT.get(name_class(layer))


def find_base(layer: nn.Module) -> str | None:
    """Name the known class that a layer's own builds on."""
    known = {name for form in FORMS.values() for name in form.classes} | KEPT.keys()
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(layer).__mro__)
    return next((name for name in names if name in known), None)


def name_class(module: nn.Module) -> str:
    """Full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find_num_heads(layer: nn.Module) -> int:
    """Read the number of heads under the names that libraries give it."""
    names = ("num_heads", "num_attention_heads", "heads", "n_heads")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


def keep_same(tensor: Tensor) -> Tensor:
    """Make a projection of one of another name."""
    return tensor


def read_key_mask(mask: Tensor | None, x: Tensor, *, is_causal: bool = False) -> Tensor | None:
    """Understand an attention mask that only hides padding, as a key mask [B, N].

    Args:
        mask: broadcasts to [B, H, N, N]; bool, true where a query sees a key, or float to be added,
            0 there. What queries that are padding themselves see is of no account.
        x: [B, N, C], the tokens.

    Raises:
        InputError: a causal mask, or one that hides or prefers anything else.
    """
    if is_causal:
        raise InputError("an EcoFormer layer sees all tokens, so it cannot be causal.")
    if mask is None:
        return None
    num_images, num_tokens = x.shape[:2]
    shape = (1,) * (4 - mask.ndim) + mask.shape
    sizes = ((1, num_images), shape[1:2], (1, num_tokens), (num_tokens,))
    if len(shape) != 4 or any(n not in allowed for n, allowed in zip(shape, sizes, strict=True)):
        raise InputError(
            f"an attention mask {list(mask.shape)} does not fit {num_images} inputs of "
            f"{num_tokens} tokens; give one that broadcasts to "
            f"{[num_images, 1, num_tokens, num_tokens]}."
        )
    mask = mask.reshape(shape)
    is_wrong = torch.zeros((), dtype=torch.bool, device=mask.device)
    if mask.is_floating_point():
        is_seen = mask == 0
        is_wrong = (~is_seen & (mask > torch.finfo(mask.dtype).min / 2)).any()
    else:
        is_seen = mask.bool()
    key_mask = is_seen.any(dim=(1, 2))
    differs = is_seen != key_mask[:, None, None]
    if shape[2] > 1:
        differs &= key_mask[:, None, :, None]
    _require(
        ~(is_wrong | differs.any()),
        "an EcoFormer layer takes no attention mask but one that hides padding from all tokens.",
    )
    return key_mask.expand(num_images, num_tokens)


def _require(condition: Tensor, message: str) -> None:
    """Raise an InputError where a condition [] is false; compiled code raises a RuntimeError."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition.is_meta and not condition:
        raise InputError(message)
