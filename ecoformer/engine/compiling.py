"""The model as ``torch.compile`` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ecoformer.tasks.base import Network


def compile_model(model: nn.Module) -> nn.Module:
    """Hand a model to ``torch.compile``; it stays usable itself, for a fit say."""
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled


def vary_batch_size(network: Network) -> Network:
    """Announce to a compiled network that other batches have another size.

    It then compiles once for all sizes, but for batches of one, which are a case of their own. To
    a network that is not compiled it means nothing. Tensors that it is called with have the batch
    on their first axis.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return network(*args, **kwargs)

    return call
