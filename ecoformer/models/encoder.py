"""A small transformer encoder for sequences of tokens, in which attention kinds are compared.

Paper: Nystromformer, arXiv 2102.03902, whose sizes Skyformer, arXiv 2111.00035, keeps. Written anew
from the papers; padding counts nowhere, also not in the mean.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ecoformer.attention import LayerSpec
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.models.base import build_blocks, init_layer, spread_drop_path
from ecoformer.models.encoder_family import FAMILY
from ecoformer.models.mlp import Mlp


class SequenceEncoder(nn.Module):
    """Tokens [B, N], int64, to logits [B, num_classes]; N is at most ``max_tokens``.

    Embedding and learned positions, pre-norm blocks, the mean of real tokens, a head of two layers.
    ``proj_drop_rate`` drops in attention, MLP and after the embedding.
    """

    def __init__(
        self,
        attention: str,
        *,
        num_classes: int,
        num_words: int,
        max_tokens: int,
        depth: int = 2,
        dim: int = 64,
        num_heads: int = 2,
        hidden_dim: int = 128,
        hashing: HashConfig | None = None,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_words, dim)
        self.positions = nn.Embedding(max_tokens, dim)
        self.embed_drop = nn.Dropout(proj_drop_rate)
        self.blocks = build_blocks(
            [attention],
            LayerSpec(dim, num_heads, proj_drop=proj_drop_rate, hashing=hashing),
            lambda: Mlp(dim, hidden_dim, proj_drop_rate),
            spread_drop_path(drop_path_rate, depth),
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_classes)
        )
        self.apply(init_layer)

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Classify; ``key_mask`` [B, N], bool, is true for a real token, None where all are.

        Raises:
            InputError: more tokens than positions.
        """
        num_tokens, num_positions = tokens.shape[1], self.positions.num_embeddings
        if num_tokens > num_positions:
            raise InputError(
                f"a sequence of {num_tokens} tokens is longer than the model's {num_positions} "
                "positions; build it with a larger max_tokens."
            )
        x = self.embed_drop(self.embed(tokens) + self.positions.weight[:num_tokens])
        for block in self.blocks:
            x = block(x, None, key_mask)
        x = self.norm(x)
        if key_mask is None:
            return self.head(x.mean(1))
        num_real = key_mask.sum(1, keepdim=True).clamp(min=1)
        return self.head(x.masked_fill(~key_mask.unsqueeze(-1), 0).sum(1) / num_real)


def create_model(variant: str, attention: str = "ecoformer", **options: Any) -> SequenceEncoder:
    """Build an encoder with fresh weights; ``options`` are those of ``SequenceEncoder``.

    Raises:
        InputError: no such variant, it has no such attention, or sizes are missing, which a task
            of sequences gives.
    """
    FAMILY.check(variant, attention)
    missing = [name for name in ("num_classes", "num_words", "max_tokens") if name not in options]
    if missing:
        raise InputError(
            f"{variant} takes sequences, and has no {', '.join(missing)} of its own; use it with "
            "ecoformer train --task sequence, and name a model of images here."
        )
    return SequenceEncoder(attention, **options)
