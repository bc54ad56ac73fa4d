"""The model as ``torch.compile`` runs it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def vary_batch_size(images: Tensor) -> Tensor:
    """Announce to a compiled model that other batches hold more or fewer images than this one.

    It then compiles once for all sizes, but for batches of a single image, which are a case of
    their own. To a model that is not compiled it means nothing.

    Args:
        images: [B, ...], any dtype.

    Returns:
        ``images``.
    """
    torch._dynamo.maybe_mark_dynamic(images, 0)
    return images
