"""What a conversion made of each layer, and from how many tokens on it pays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ecoformer.attention.softmax import count_softmax
from ecoformer.models.conversion.layer import ConvertedAttention

# Time of an operation of codes over one of softmax, as both are counted. The committed benchmark
# (.github/results/benchmark_cpu.md, cores of D = 32, 784 and 3,136 tokens, two CPU cores) has them
# equally fast at about 90 tokens; the counts are equal at 28.
_RELATIVE_TIME = 90 / 28


@dataclass(frozen=True)
class ConversionReport:
    """What became of the attention of a model, by names of layers; ``str`` is a table.

    Args:
        converted: what each EcoFormer layer is.
        kept: why each other attention layer is as it was.
        advice: from how many tokens on the conversion saves time, in a sentence.
    """

    converted: Mapping[str, str]
    kept: Mapping[str, str]
    advice: str

    def __str__(self) -> str:
        rows = [("layer", "attention", "what")]
        rows += [(name, "EcoFormer", what) for name, what in self.converted.items()]
        rows += [(name, "as it was", why) for name, why in self.kept.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
        return "\n".join([*lines, "", self.advice])


def describe(layer: nn.Module, made: ConvertedAttention) -> str:
    """Say what an EcoFormer layer was made of, and what of that has no meaning any more."""
    text = f"{made.num_heads} heads of {made.head_dim} channels, from {type(layer).__name__}"
    dropout: Any = getattr(layer, "attn_drop", None) or getattr(layer, "dropout", None)
    rate = getattr(dropout, "p", dropout)
    if isinstance(rate, float) and rate:
        text += f", without its dropout of {rate:g} on the map"
    return text


def advise(model: nn.Module, layers: Iterable[ConvertedAttention]) -> str:
    """Compare the tokens of a model with those from which on EcoFormer attention takes less time.

    The number is estimated: operations as the cost model counts them, times what one takes.
    """
    num_needed = max(map(_find_crossover, layers))
    text = (
        f"EcoFormer attention saves time from about {num_needed} tokens on (an estimate for a CPU)"
    )
    num_tokens = _count_tokens(model)
    if num_tokens is None:
        return f"{text}; with fewer the conversion will not pay."
    if num_tokens < num_needed:
        return f"{text}; this model has {num_tokens}, so that the conversion will not pay."
    return f"{text}; this model has {num_tokens}."


def _find_crossover(layer: ConvertedAttention) -> int:
    """Tokens for which softmax between the same projections takes as long."""
    channels = layer.num_heads * layer.head_dim
    # The one grows with tokens, the other with their square.
    linear, square = sum(layer.count_attention(1)), sum(count_softmax(1, channels, layer.num_heads))
    return round(_RELATIVE_TIME * linear / square)


def _count_tokens(model: Any) -> int | None:
    """Tokens of a plain vision transformer of timm or transformers; None for other models."""
    prefix = getattr(model, "num_prefix_tokens", None)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if isinstance(prefix, int) and isinstance(patches, int):
        return prefix + patches
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    side, patch = (getattr(config, f"{what}_size", None) for what in ("image", "patch"))
    return (side // patch) ** 2 if isinstance(side, int) and isinstance(patch, int) else None
