"""What a conversion made of each layer, and whether it pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ecoformer.models.conversion.layer import ConvertedAttention


@dataclass(frozen=True)
class ConversionReport:
    """What became of the attention of a model, by names of layers; ``str`` is a table.

    Args:
        converted: what each EcoFormer layer is.
        kept: why each other attention layer is as it was.
    """

    converted: Mapping[str, str]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        rows = [("layer", "attention", "what")]
        rows += [(name, "EcoFormer", what) for name, what in self.converted.items()]
        rows += [(name, "as it was", why) for name, why in self.kept.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
        return "\n".join(lines)


def describe(layer: Any, made: ConvertedAttention) -> str:
    """Say of what a layer was made."""
    facts = [f"{type(layer).__name__}, {made.num_heads} heads of {made.head_dim} channels"]
    return ", ".join(facts)
