"""Sparse targets against the dense matrix that they stand for."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from ecoformer.hashing import targets as module
from ecoformer.hashing.targets import SimilarityTargets
from ecoformer.ops import reference
from tests.problems import draw, draw_unit_rows


@pytest.mark.parametrize(("tokens", "num_similar"), [(40, 5), (17, 8), (2, 1), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_mkl", [True, False])
def test_product_equals_the_dense_one(
    tokens: int,
    num_similar: int,
    dtype: torch.dtype,
    has_mkl: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not has_mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    x = draw_unit_rows(2, 3, tokens, 8).to(dtype)
    y = draw(2, 3, tokens, seed=1).to(dtype)
    dense = reference.similarity_targets(x, num_similar)
    expected = ((dense + dense.transpose(-1, -2)) @ y.unsqueeze(-1)).squeeze(-1)
    product = SimilarityTargets.from_rows(x, num_similar).multiply(y)
    assert product.dtype == dtype
    torch.testing.assert_close(product, expected)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw_unit_rows(2, 3, 40, 8), draw(2, 3, 40, seed=1)
    whole = SimilarityTargets.from_rows(x, 5).multiply(y)
    # Rows in chunks of 7, the last of 5.
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 7 * 2 * 3 * 40)
    torch.testing.assert_close(SimilarityTargets.from_rows(x, 5).multiply(y), whole)


@pytest.mark.parametrize("tokens", [320, 333])
@pytest.mark.parametrize("is_masked", [False, True])
def test_search_in_groups_chooses_the_same_tokens(
    tokens: int, is_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = draw_unit_rows(2, 3, tokens, 8), draw(2, 3, tokens, seed=1)
    mask = draw(2, tokens, seed=2) > -0.5 if is_masked else None
    whole = SimilarityTargets.from_rows(x, 5, mask)
    searched = []
    search = module._search_groups

    def remember(*args: Any, **options: Any) -> Any:
        searched.append(args)
        return search(*args, **options)

    monkeypatch.setattr(module, "_MANY_TOKENS", tokens)
    monkeypatch.setattr(module, "_search_groups", remember)
    grouped = SimilarityTargets.from_rows(x, 5, mask)
    assert searched
    assert torch.equal(grouped.row_starts, whole.row_starts)
    torch.testing.assert_close(grouped.multiply(y), whole.multiply(y))


def test_search_keeps_no_chunk() -> None:
    # 64 chunks of 16 MiB; the tokens that are chosen, and their matrix, take 60 MB.
    code = """
import resource, torch
from ecoformer.hashing.targets import SimilarityTargets
x = torch.nn.functional.normalize(torch.randn(1, 1, 16_384, 32), dim=-1)
SimilarityTargets.from_rows(x[:, :, :1024], 10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
SimilarityTargets.from_rows(x, 10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    words = [sys.executable, "-c", code]
    kilobytes = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert kilobytes < 200_000


def test_a_token_is_its_own_most_similar_one() -> None:
    x = draw_unit_rows(1, 1, 9, 8)
    targets = SimilarityTargets.from_rows(x, 1)
    diagonal = torch.stack([targets.multiply(y[None, None])[0, 0] for y in torch.eye(9).double()])
    assert torch.equal(diagonal.diagonal(), torch.full((9,), 2.0).double())


def test_a_row_holds_as_many_most_as_least_similar_tokens() -> None:
    targets = SimilarityTargets.from_rows(draw_unit_rows(2, 1, 30, 8), 4)
    assert targets.signs.sum() == 0
    assert len(targets.signs) == 2 * (2 * 30 * 2 * 4)


@pytest.mark.parametrize("number", [1.0, float("nan")])
def test_tokens_that_nobody_chooses_have_rows_too(number: float) -> None:
    # Among equal rows the search takes any, so the last ones are left out.
    x = torch.full((2, 3, 40, 8), number)
    product = SimilarityTargets.from_rows(x, 2).multiply(torch.ones(2, 3, 40))
    assert torch.equal(product.sum(-1), torch.zeros(2, 3))
