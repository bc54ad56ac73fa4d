"""The model as ``torch.compile`` runs it."""

from __future__ import annotations

import torch
from torch import nn


def compile_model(model: nn.Module) -> nn.Module:
    """Hand a model to ``torch.compile``; it stays usable itself, for a fit say.

    Args:
        model: the bare model.

    Returns:
        The compiled model, over the same parameters and buffers.
    """
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled
