"""The model as ``torch.compile`` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ecoformer.tasks.base import Network


def compile_model(model: nn.Module, mode: str = "default") -> nn.Module:
    """Hand a model to ``torch.compile`` in a mode; it stays usable itself, for a fit say."""
    compiled = torch.compile(model, mode=mode)
    assert isinstance(compiled, nn.Module)
    return compiled


def vary_batch_size(network: Network) -> Network:
    """Let a compiled network compile once for all batch sizes but one, a case of its own.

    The tensors that it is called with have the batch on their first axis.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return network(*args, **kwargs)

    return call
