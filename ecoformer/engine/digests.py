"""What all ranks must hold alike, compared by digest."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ecoformer.ranks import AgreedError, gather_objects, world_size


def digest(value: Any) -> str:
    """Hash a nest of containers, tensors and plain values; 1 GB takes about a second."""
    state = hashlib.blake2b(digest_size=16)

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            state.update(f"{item.dtype}{list(item.shape)}".encode())
            state.update(
                item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )
        elif isinstance(item, Mapping):
            for name, inner in item.items():
                state.update(f"{name!r}:".encode())
                add(inner)
        elif isinstance(item, (list, tuple)):
            for inner in item:
                add(inner)
        state.update(
            b";" if isinstance(item, (Tensor, Mapping, list, tuple)) else repr(item).encode()
        )

    add(value)
    return state.hexdigest()


def require_same_on_all(value: Any, found: str, remedy: str, label: str = "") -> None:
    """Compare what all ranks hold.

    ``found`` says what is wrong on a rank that differs from rank 0, and ``label`` what a rank has.

    Raises:
        AgreedError: one differs.
    """
    if world_size() == 1:
        return
    all_ranks = gather_objects((digest(value), socket.gethostname(), label))
    for number, (other, host, place) in enumerate(all_ranks):
        if other != all_ranks[0][0]:
            first_host, first_place = all_ranks[0][1:]
            raise AgreedError(
                f"{found} on rank {number} ({', '.join(filter(None, (host, place)))}) than on rank "
                f"0 ({', '.join(filter(None, (first_host, first_place)))}); {remedy}."
            )
