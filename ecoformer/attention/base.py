"""What the kinds of attention have in common, and what a kind says of itself."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from einops import rearrange
from torch import Tensor, nn

from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.ops.masks import check_key_mask

# (height, width) of the map that tokens come from; height * width = N.
Size: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class LayerSpec:
    """What a backbone asks of an attention layer; each kind takes what concerns it."""

    dim: int
    num_heads: int
    qkv_bias: bool = True
    proj_drop: float = 0.0
    # Of EcoFormer; the published settings where None.
    hashing: HashConfig | None = None
    # Of spatial reduction: how much it shrinks the map's sides, or whether it pools instead.
    sr_ratio: int = 1
    is_linear: bool = False


@dataclass(frozen=True)
class Derived:
    """How a projection is made of the parent's projections named ``sources``.

    ``make`` is called with their weights, and again with their biases; outputs lie along axis 0.
    A rule for one entry alone, as ``"to_qk.bias"``, has entries as ``sources``.
    ``leaves_out`` names modules that go, or a part of a source, as ``"qkv[k]"``.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    leaves_out: tuple[str, ...] = ()


class MultiHeadAttention(nn.Module, ABC):
    """Self-attention. A kind says how heads attend, and all that others ask of it.

    ``register_attention`` gives it the name by which backbones, tables and plots know it.

    Attributes:
        kind: that name; the name of the class where it is not registered.
        label: what tables and plots call it; its name where the class says nothing.
        cost_note: a sentence beside its cost, where no published figure confirms it.
        parent: kind that its weights can be made of, if any.
        derived: its projections that are not the parent's of equal name.
        own_buffers: buffers, or modules of them, that no weights of another kind give.
        any_backbone: whether every backbone takes it, or those alone that name it.
        takes_key_mask: whether its ``attend`` has an argument ``key_mask``.

    Raises:
        InputError: ``num_heads`` does not divide ``dim``.
    """

    kind: ClassVar[str]
    label: ClassVar[str]
    cost_note: ClassVar[str] = ""
    parent: ClassVar[str | None] = None
    derived: ClassVar[Mapping[str, Derived]] = {}
    own_buffers: ClassVar[tuple[str, ...]] = ()
    any_backbone: ClassVar[bool] = True
    takes_key_mask: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.kind = cls.__name__
        # Of the method and not a word of the class: a kind that builds on another one may lose it.
        cls.takes_key_mask = "key_mask" in inspect.signature(cls.attend).parameters

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"{num_heads} heads cannot share {dim} channels; give a divisor.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads

    @classmethod
    def from_spec(cls, spec: LayerSpec) -> MultiHeadAttention:
        """Build the layer for a backbone; kinds with settings of their own override this."""
        build: Callable[..., MultiHeadAttention] = cls
        return build(spec.dim, spec.num_heads, spec.qkv_bias, spec.proj_drop)

    def add_output(self, dim: int, proj_drop: float) -> None:
        """Make the output projection; after those of the inputs, the order of released weights."""
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def split_heads(self, *rows: Tensor) -> list[Tensor]:
        """View each [B, N, C] as [B, H, N, D]: a head has contiguous channels."""
        return [rearrange(x, "b n (h d) -> b h n d", h=self.num_heads) for x in rows]

    def forward(
        self,
        x: Tensor,
        size: Size | None = None,
        key_mask: Tensor | None = None,
        *,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend, and project what the heads found: [B, N, C] to [B, N, C], float.

        The keywords are what timm's blocks pass to any attention; all tokens see each other here.

        Args:
            key_mask: [B, N], bool, true for a real token; None where all are. The result, and its
                gradients, are those of the real tokens alone, whatever masked ones hold; the rows
                of masked ones are 0, also after the output projection.

        Raises:
            InputError: ``size`` is missing, too small for the kind or something else; the kind
                takes no ``key_mask``, or it has another shape or dtype; another mask is given; hash
                functions are not fitted.
        """
        if size is not None and not (isinstance(size, (tuple, list)) and len(size) == 2):
            raise InputError(
                f"layer(x, size) takes the map's (height, width), not a {type(size).__name__}; "
                "it has no context, and its one mask is key_mask."
            )
        if attn_mask is not None or is_causal:
            raise InputError(
                "this attention takes no attn_mask and is never causal; leave it out, or give the "
                "real tokens as key_mask [images, tokens]."
            )
        if key_mask is None:
            return self.proj_drop(self.proj(self.attend(x, size)))
        if not self.takes_key_mask:
            raise InputError(
                f"{self.kind} attention takes no key_mask: its tokens are those of a whole map."
            )
        check_key_mask(key_mask, x)
        is_masked = ~key_mask.unsqueeze(-1)
        attend: Callable[..., Tensor] = self.attend
        heads = attend(x.masked_fill(is_masked, 0), size, key_mask=key_mask)
        return self.proj_drop(self.proj(heads)).masked_fill(is_masked, 0)

    def __prepare_scriptable__(self) -> None:
        """Answer ``torch.jit.script``, which would fail somewhere inside, with all of its trace."""
        raise InputError(
            "a model with this attention cannot be scripted; use torch.export.export, "
            "torch.compile or torch.jit.trace(model, images)."
        )

    @abstractmethod
    def attend(self, x: Tensor, size: Size | None) -> Tensor:
        """Project the inputs, attend in each head, merge the heads: [B, N, C] to [B, N, C].

        A kind that takes a ``key_mask``, [B, N] or None, has it as a third argument, None by
        default: real tokens then see each other alone. Rows of masked tokens are 0 in ``x``; those
        of the result are finite, and do not count.
        """

    @abstractmethod
    def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
        """Multiplications and additions of the attention of one image, projections aside."""

    def count_call(
        self, args: Sequence[Any], keywords: Mapping[str, Any], out: Any
    ) -> tuple[int, int]:
        """The same of one call that returned ``out``, [B, N, C]: each of the B rows counts.

        A layer with another way to be called, or to answer, overrides this.
        """
        size = args[1] if len(args) > 1 else keywords.get("size")
        mul, add = self.count_attention(out.shape[1], size)
        return out.shape[0] * mul, out.shape[0] * add


def require_size(size: Size | None) -> Size:
    """Insist on the size of the map: an InputError where it was not given."""
    if size is None:
        raise InputError("this attention needs the map's size: call layer(x, (height, width)).")
    return size
