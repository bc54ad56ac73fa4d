"""Which tokens the codes should bring together, and which apart, as a sparse matrix.

Shapes: B batch, H heads, N tokens, D head dim, T similar pairs a token, E entries.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Similarities held at once while neighbours are searched: 16 MiB in float32.
_CHUNK_ELEMENTS = 2**22
# From so many tokens on, they are searched in groups of 16 first: at 16,384 in half the time, at
# 66,800 in a quarter, at 3,136 in the same.
_MANY_TOKENS = 2**13
_GROUP_SIZE = 16


@dataclass(frozen=True)
class SimilarityTargets:
    """The symmetric part ``P + P^T`` of the targets of all heads, block-diagonal, row by row.

    Row n of P has +1 at the T tokens most similar to n, itself among them, and -1 at the T
    least similar. A row holds 2 T entries, and those of the tokens that chose it. Masked tokens
    choose nobody, and nobody chooses them.
    """

    columns: Tensor  # [E], int64, one row after the other
    row_starts: Tensor  # [B * H * N], int64, into ``columns``
    signs: Tensor  # [E], float, +1 or -1

    @classmethod
    def from_rows(
        cls, x: Tensor, num_similar: int, key_mask: Tensor | None = None
    ) -> SimilarityTargets:
        """Search the T <= N // 2 neighbours of every unit row [B, H, N, D] in image and head.

        With a mask [B, N], an image of fewer than 2 T real tokens has half of them for T.
        """
        num_tokens = x.shape[-2]
        mask = None if key_mask is None else key_mask.repeat_interleave(x.shape[1], 0)  # [B * H, N]
        chosen = _choose_neighbours(x.flatten(0, 1), num_similar, mask)  # [B * H, N, 2 T]
        first_token = torch.arange(chosen.shape[0], device=x.device) * num_tokens
        columns = (chosen + first_token[:, None, None]).flatten()
        rows = torch.arange(columns.numel() // (2 * num_similar), device=x.device)
        rows = rows.repeat_interleave(2 * num_similar)
        signs = x.new_ones(2 * num_similar)
        signs[num_similar:] = -1
        signs = signs.repeat(columns.numel() // (2 * num_similar))
        if mask is not None:
            ranks = torch.arange(num_similar, device=x.device).repeat(2)
            is_kept = mask.unsqueeze(-1) & (ranks < mask.sum(-1)[:, None, None] // 2)
            columns, rows, signs = (
                entries[is_kept.flatten()] for entries in (columns, rows, signs)
            )
        # The transpose's entries join those of P, sorted into its rows.
        both = torch.cat([rows, columns])
        order = both.argsort(stable=True)
        # Where rows are equal, or not finite, a token may be chosen by nobody, not even itself.
        counts = torch.bincount(both, minlength=chosen.shape[0] * num_tokens)
        return cls(
            columns=torch.cat([columns, rows])[order],
            row_starts=counts.cumsum(0) - counts,
            signs=torch.cat([signs, signs])[order],
        )

    def multiply(self, y: Tensor) -> Tensor:
        """Return ``(P + P^T) y`` for y [B, H, N], float, the same bits in every run."""
        if y.device.type == "cpu" and torch.backends.mkl.is_available():
            return torch.mv(self._csr.to(y.dtype), y.flatten()).view_as(y)
        # A weighted sum of one-wide embeddings: six times as slow as MKL's sparse product on a
        # CPU, but there everywhere, and unlike the sparse product of CUDA deterministic.
        product = embedding_bag(
            self.columns,
            y.reshape(-1, 1),
            self.row_starts,
            mode="sum",
            per_sample_weights=self.signs.to(y.dtype),
        )
        return product.view_as(y)

    @cached_property
    def _csr(self) -> Tensor:
        num_entries, num_rows = self.columns.numel(), self.row_starts.numel()
        ends = self.row_starts.new_tensor([num_entries])
        with warnings.catch_warnings():
            # PyTorch calls these tensors a beta.
            warnings.simplefilter("ignore")
            return torch.sparse_csr_tensor(
                torch.cat([self.row_starts, ends]).int(),
                self.columns.int(),
                self.signs,
                size=(num_rows, num_rows),
                # A pair that chose each other stands twice in a row, and counts twice.
                check_invariants=False,
            )


def _choose_neighbours(x: Tensor, num_similar: int, mask: Tensor | None) -> Tensor:
    """Find the T most, then the T least similar tokens of each: [B * H, N, 2 T], int64.

    With a mask [B * H, N] in order of rank, the masked ones last.
    """
    num_groups, num_tokens, _ = x.shape
    chunk = max(1, _CHUNK_ELEMENTS // (num_groups * num_tokens))
    is_grouped = num_tokens >= max(_MANY_TOKENS, 4 * _GROUP_SIZE * num_similar)
    search = _search_groups if is_grouped else torch.topk
    chosen = torch.empty(num_groups, num_tokens, 2, num_similar, dtype=torch.int64, device=x.device)
    # Kept for all chunks: new memory for each, with what is chosen between, leaves holes that
    # fit no other, of 6 GB in all at 66,800 tokens.
    similarities = x.new_empty(num_groups, min(chunk, num_tokens), num_tokens)
    for rows, places in zip(x.split(chunk, dim=1), chosen.split(chunk, dim=1), strict=True):
        found = similarities[:, : rows.shape[1]]  # [B * H, chunk, N]
        torch.matmul(rows, x.transpose(-1, -2), out=found)
        for half, (largest, worst) in enumerate(((True, -torch.inf), (False, torch.inf))):
            if mask is not None:
                found.masked_fill_(~mask.unsqueeze(-2), worst)
            _, places[:, :, half] = search(
                found, num_similar, largest=largest, sorted=mask is not None
            )
    return chosen.flatten(-2)


def _search_groups(x: Tensor, k: int, *, largest: bool, sorted: bool) -> tuple[Tensor, Tensor]:
    """Do what ``torch.topk`` does along the last dimension, of at least 16 k elements.

    The k groups of the best maxima hold the k best elements; among equal ones, others may be taken.
    """
    num_groups = x.shape[-1] // _GROUP_SIZE
    # Group g is g, g + num_groups ..., so that all maxima come from whole rows, and the last few
    # elements are in none.
    groups = x[..., : num_groups * _GROUP_SIZE].unflatten(-1, (_GROUP_SIZE, num_groups))
    best = groups.amax(-2) if largest else groups.amin(-2)
    chosen = best.topk(k, largest=largest, sorted=False).indices
    members = torch.arange(_GROUP_SIZE, device=x.device) * num_groups
    rest = torch.arange(num_groups * _GROUP_SIZE, x.shape[-1], device=x.device)
    candidates = torch.cat(
        [(chosen.unsqueeze(-1) + members).flatten(-2), rest.expand(*x.shape[:-1], -1)], dim=-1
    )
    values, places = x.gather(-1, candidates).topk(k, largest=largest, sorted=sorted)
    return values, candidates.gather(-1, places)
