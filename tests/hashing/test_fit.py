"""The fit of one layer: equal to the dense one, linear in memory, honest in its choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ecoformer import NonFiniteError, fit_hash, ops
from ecoformer.hashing import targets
from ecoformer.hashing.fit import _agreement
from ecoformer.hashing.targets import SimilarityTargets
from ecoformer.ops import reference
from tests.problems import LargestTensor, draw, draw_unit_rows


def draw_fit(
    *,
    images: int = 2,
    heads: int = 2,
    tokens: int = 40,
    dim: int = 8,
    bits: int = 6,
    anchors: int = 8,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Any]]:
    """Rows, and the anchors and weight that a fit starts from."""
    x = draw_unit_rows(images, heads, tokens, dim, seed=seed)
    first = x.transpose(0, 1).flatten(1, 2)[:, torch.arange(anchors) % (images * tokens)]
    return x, {"anchors": first, "weight": draw(heads, bits, anchors, seed=seed + 1)}


FITS: dict[str, dict[str, Any]] = {
    **{f"seed {seed}": {"seed": seed} for seed in range(4)},
    "odd": {"tokens": 33},
    "one head": {"heads": 1},
    "five heads": {"heads": 5, "images": 3},
    "fewer tokens than pairs": {"tokens": 9},
    "fewer tokens than anchors": {"tokens": 7, "anchors": 12},
    "two tokens": {"tokens": 2, "anchors": 4},
    "one bit": {"bits": 1},
}


@pytest.mark.parametrize("size", FITS.values(), ids=FITS)
def test_fit_equals_the_dense_one(size: dict[str, Any]) -> None:
    x, start = draw_fit(**size)
    fit = fit_hash(x, **start, num_similar=5, num_steps=60)
    weight, kernel_mean = reference.fit_hash(x, **start, num_similar=5, num_steps=60)
    torch.testing.assert_close(fit.weight, weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fit.kernel_mean, kernel_mean, rtol=1e-12, atol=1e-12)
    assert torch.equal(fit.is_changed, (weight != start["weight"]).any(-1).any(0))


def test_the_seeds_above_move_some_rows_and_keep_others() -> None:
    fits = [fit_hash(draw_fit(seed=seed)[0], **draw_fit(seed=seed)[1]) for seed in range(4)]
    is_changed = torch.cat([fit.is_changed for fit in fits])
    assert is_changed.any() and not is_changed.all()


def test_a_row_moves_only_where_the_codes_gain() -> None:
    x, start = draw_fit(seed=3)
    residual = 6 * reference.similarity_targets(x, 5)
    fit = fit_hash(x, **start, num_similar=5)
    for bit in range(6):
        old, new = (
            ops.encode(x, anchors=start["anchors"], weight=w, kernel_mean=fit.kernel_mean)[..., bit]
            for w in (start["weight"], fit.weight)
        )
        gains = [torch.einsum("bhn,bhnl,bhl->", y, residual, y) for y in (old, new)]
        assert gains[1] > gains[0] if fit.is_changed[bit] else torch.equal(old, new)
        residual -= new.unsqueeze(-1) * new.unsqueeze(-2)


def test_agreement_is_counted_exactly() -> None:
    # 4099^2 is odd and beyond 2^24, where float32 stops counting.
    tokens = 4099
    codes = torch.ones(1, 1, tokens)
    similarities = SimilarityTargets.from_rows(draw_unit_rows(1, 1, tokens, 4).float(), 1)
    agreement = _agreement(codes, similarities, codes.unsqueeze(2), num_bits=1)
    assert agreement.item() == -(tokens**2)


def test_what_was_passed_in_is_left_alone() -> None:
    x, start = draw_fit()
    before = [tensor.clone() for tensor in (x, *start.values())]
    fit_hash(x, **start)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *start.values()), strict=True))


def test_no_step_keeps_the_start() -> None:
    x, start = draw_fit()
    fit = fit_hash(x, **start, num_steps=0)
    assert torch.equal(fit.weight, start["weight"])
    assert not fit.is_changed.any()


@pytest.mark.parametrize(
    ("given", "learned"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_precision_is_full(given: str, learned: str) -> None:
    x, start = draw_fit()
    fit = fit_hash(x.to(getattr(torch, given)), **start, num_steps=2)
    assert {fit.weight.dtype, fit.kernel_mean.dtype} == {getattr(torch, learned)}


def test_autocast_changes_nothing() -> None:
    x, start = draw_fit()
    x, start = x.float(), {name: tensor.float() for name, tensor in start.items()}
    outside = fit_hash(x, **start)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fit_hash(x, **start)
    assert torch.equal(outside.weight, inside.weight)
    assert torch.equal(outside.kernel_mean, inside.kernel_mean)


def test_one_token_has_nobody_to_compare_with() -> None:
    x, start = draw_fit(tokens=1, anchors=1)
    with pytest.raises(ValueError, match="needs 2, not 1"):
        fit_hash(x, **start)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_what_is_not_finite_is_an_error(where: str, number: float) -> None:
    x, start = draw_fit()
    (x if where == "x" else start["weight"]).view(-1)[3] = number
    with pytest.raises(NonFiniteError, match="not finite"):
        fit_hash(x, **start, num_steps=2)


def test_memory_is_linear_in_tokens_outside_the_neighbour_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, anchors, num_similar = 1000, 8, 3
    x, start = draw_fit(images=1, heads=1, tokens=tokens, bits=2, anchors=anchors)
    start |= {"num_similar": num_similar, "num_steps": 2}
    # Chunks of one row.
    monkeypatch.setattr(targets, "_CHUNK_ELEMENTS", tokens)
    with LargestTensor() as shipped:
        fit_hash(x, **start)
    assert 0 < shipped.numel <= tokens * (anchors + 4 * num_similar)
    with LargestTensor() as dense:
        reference.fit_hash(x, **start)
    assert dense.numel >= tokens**2
