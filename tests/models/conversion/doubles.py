"""A softmax in the place of codes, by which a converted layer can be held to the original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ecoformer
from ecoformer.hashing import KernelHash
from ecoformer.models.conversion import ConversionReport

# Names that libraries give to projections and norms of queries, and to those of keys.
PAIRS = [("q_proj", "k_proj"), ("query", "key"), ("q", "k"), ("q_lin", "k_lin")]
PAIRS += [("q_norm", "k_norm")]
JOINED = {"qkv": 3, "in_proj_weight": 3, "in_proj_bias": 3, "qk": 2}


def attend_by_softmax(self: KernelHash, q: Tensor, v: Tensor, key_mask: Any = None) -> Tensor:
    """What the hash stands for: softmax over rows that queries and keys share."""
    mask = None if key_mask is None else key_mask[:, None, None]
    return scaled_dot_product_attention(q, q, v, attn_mask=mask)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw all parameters: at its start a layer scale hides attention, and a norm does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Rows about as long as tokens see more than themselves with.
        scale = 0.7 * max(1, parameter[:1].numel()) ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if parameter.ndim == 1:
            parameter.add_(0.5)


@torch.no_grad()
def tie_keys(model: Any) -> int:
    """Give keys the weights of queries, in all layers; return how many pairs that were."""
    num_tied = 0
    module: Any
    for module in model.modules():
        for query, key in PAIRS:
            ours: Any = getattr(module, query, None)
            theirs: Any = getattr(module, key, None)
            if isinstance(ours, nn.Module) and isinstance(theirs, nn.Module):
                theirs.load_state_dict(
                    {n: t for n, t in ours.state_dict().items() if n in theirs.state_dict()}
                )
                num_tied += bool(theirs.state_dict())
                # EVA's keys have no bias.
                if getattr(ours, "bias", None) is not None and getattr(theirs, "bias", 0) is None:
                    ours.get_parameter("bias").zero_()
        if hasattr(module, "q") and hasattr(module, "kv"):
            for leaf in ("weight", "bias"):
                keys, _ = getattr(module.kv, leaf).chunk(2)
                keys.copy_(getattr(module.q, leaf))
            num_tied += 1
        for name, num_parts in JOINED.items():
            joined = getattr(module, name, None)
            for tensor in [joined] if isinstance(joined, Tensor) else _parameters(joined):
                parts = tensor.chunk(num_parts)
                parts[1].copy_(parts[0])
                num_tied += 1
        if isinstance(getattr(module, "q_bias", None), Tensor):
            module.q_bias.zero_()
    return num_tied


def _parameters(module: object) -> list[Tensor]:
    return list(module.parameters()) if isinstance(module, nn.Module) else []


def assert_wired(
    model: nn.Module, run: Any, monkeypatch: pytest.MonkeyPatch, *, select: Any = None
) -> ConversionReport:
    """Convert, with a softmax for codes: output and gradients are those of the original.

    ``run`` gets the model and returns a tensor.
    """
    randomize(model)
    assert tie_keys(model)
    original = copy.deepcopy(model)
    report = ecoformer.convert(model, select=select)
    with monkeypatch.context() as patch:
        patch.setattr(KernelHash, "forward", attend_by_softmax)
        out, expected = run(model), run(original)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        # Not trivially: what attention adds is seen.
        out.square().mean().backward()
        expected.square().mean().backward()
    theirs = {n: p.grad for n, p in original.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name not in theirs:
            continue
        # What acted on queries and on keys acts once on the rows that they share.
        key = theirs.get(name.replace("q_norm", "k_norm")) if "q_norm" in name else None
        gradient = theirs[name] if key is None else theirs[name] + key
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
    return report
