"""Fitting all hash functions of a model on one batch, front to back.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ecoformer.errors import InputError, NonFiniteError
from ecoformer.hashing.fit import HashFit, fit_hash
from ecoformer.hashing.kernel_hash import KernelHash
from ecoformer.ops import normalize_rows, without_autocast

_logger = logging.getLogger(__name__)


def hash_layers(model: nn.Module) -> dict[str, KernelHash]:
    """Find the hash functions of a model by name, in the order of its modules."""
    return {name: m for name, m in model.named_modules() if isinstance(m, KernelHash)}


def find_statistics(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Find what else a forward may change: other buffers of the state dict, as BatchNorm's.

    Each by its module and its name there, since a forward may also put a new tensor in its place.
    """
    return [
        (module, name)
        for module in model.modules()
        if not isinstance(module, KernelHash)
        for name, _ in module.named_buffers(recurse=False)
        # Those are tables and caches, which follow from the sizes of module and inputs.
        if name not in module._non_persistent_buffers_set
    ]


@torch.no_grad()
def fit_hash_functions(
    model: nn.Module, inputs: object, generator: torch.Generator | None = None
) -> dict[str, HashFit]:
    """Learn the hash functions of every EcoFormer layer from one batch; return them by layer.

    The batch runs through the model once, front to back: a layer is fitted just before its first
    use, so the next one sees rows that were already hashed. The model stays in its mode, train or
    eval; autocast is off. A first fit starts from standard-normal rows, a refit from the present
    ones; anchors are drawn anew either way. Where a layer is called with a ``key_mask``, its masked
    tokens have no part in its fit. All else in the model's state dict, as BatchNorm's running
    statistics, is what it was, after an error too.

    Args:
        inputs: what the model takes, prepared as for training, on its device: a tuple of several
            arguments, a mapping of keywords, a function that gets the model and runs it; anything
            else is one argument, as images [B, 3, height, width] or a detector's list of them.
        generator: a CPU generator that all draws come from, in layer order.

    Raises:
        InputError: no EcoFormer layer, none that the inputs reach, or fewer tokens in the batch
            than anchors.
        NonFiniteError: a layer's rows or its fit are not finite; the layer is named.

    Source: EcoFormer, arXiv 2209.09004.
    """
    layers = hash_layers(model)
    if not layers:
        raise InputError("the model has no EcoFormer layer, so there is nothing to fit.")
    fits: dict[str, HashFit] = {}
    short: list[str] = []
    statistics = find_statistics(model)
    before = [module.get_buffer(name).clone() for module, name in statistics]
    handles = []
    for name, layer in layers.items():

        def fit_before_use(
            module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], name: str = name
        ) -> None:
            assert isinstance(module, KernelHash)
            if name in fits:
                return
            q, key_mask = _find_rows(*args, **keywords)
            fits[name] = _fit_layer(name, module, q, key_mask, generator)
            fewest = q.shape[-2] if key_mask is None else int(key_mask.sum(-1).min())
            if fewest < 2 * module.config.num_similar:
                short.append(name)

        handles.append(layer.register_forward_pre_hook(fit_before_use, with_kwargs=True))
    try:
        with without_autocast(next(iter(layers.values())).weight):
            _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        for (module, name), value in zip(statistics, before, strict=True):
            module.get_buffer(name).copy_(value)
    if not fits:
        raise InputError("the inputs reach no EcoFormer layer of the model, so nothing was fitted.")
    if short:
        _logger.info(
            "fewer tokens than two times num_similar, so half of them are similar and half not: %s",
            ", ".join(short),
        )
    return fits


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, tuple):
        model(*inputs)
    elif isinstance(inputs, Mapping):
        model(**inputs)
    elif callable(inputs):
        inputs(model)
    else:
        model(inputs)


def _find_rows(
    q: Tensor, v: Tensor, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What concerns the fit of all that ``KernelHash`` is called with."""
    return q, key_mask


def _fit_layer(
    name: str,
    layer: KernelHash,
    q: Tensor,
    key_mask: Tensor | None,
    generator: torch.Generator | None,
) -> HashFit:
    config = layer.config
    x = normalize_rows(q)
    weight = layer.weight
    if not layer.is_fitted:
        weight = torch.randn(weight.shape, generator=generator).to(weight)
    anchors = _draw_anchors(name, x, key_mask, config.num_anchors, generator)
    try:
        fit = fit_hash(
            x,
            anchors=anchors,
            weight=weight,
            num_similar=config.num_similar,
            num_steps=config.num_fit_steps,
            key_mask=key_mask,
        )
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}; check the input and the weights.") from None
    layer.set_functions(weight=fit.weight, kernel_mean=fit.kernel_mean, anchors=anchors)
    return fit


def _draw_anchors(
    name: str,
    x: Tensor,
    key_mask: Tensor | None,
    num_anchors: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw [H, M, D] from real tokens of the first image, or of as many as hold M."""
    num_images, _, num_tokens, _ = x.shape
    if key_mask is None:
        num_sources = -(-num_anchors // num_tokens)
        if num_sources > num_images:
            raise InputError(
                f"{name}: {num_images} images of {num_tokens} tokens are fewer than the "
                f"{num_anchors} anchors; fit on at least {num_sources} images, or on larger ones."
            )
        tokens = rearrange(x[:num_sources], "b h n d -> h (b n) d")
    else:
        totals = key_mask.sum(-1).cumsum(0)
        num_sources = int((totals < num_anchors).sum()) + 1
        if num_sources > num_images:
            raise InputError(
                f"{name}: {int(totals[-1])} real tokens in {num_images} images are fewer than the "
                f"{num_anchors} anchors; fit on more images, or on larger ones."
            )
        tokens = rearrange(x[:num_sources], "b h n d -> h b n d")[:, key_mask[:num_sources]]
    chosen = torch.randperm(tokens.shape[1], generator=generator)[:num_anchors]
    return tokens[:, chosen.to(x.device)]


def with_random_hash_functions(model: nn.Module, seed: int = 0) -> nn.Module:
    """Copy a model so that it runs without a fit, for cost and speed, never for accuracy.

    Hash functions of the deep copy that are not fitted are random.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    for layer in hash_layers(model).values():
        if not layer.is_fitted:
            layer.set_functions(
                weight=draw(layer.weight),
                kernel_mean=draw(layer.kernel_mean),
                anchors=normalize_rows(draw(layer.anchors)),
            )
    return model
