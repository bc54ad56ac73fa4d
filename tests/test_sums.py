"""Means that come out the same in any order."""

from __future__ import annotations

import math

import pytest
import torch

from ecoformer.sums import ExactMean

CPU = torch.device("cpu")


def mean_of(*chunks: torch.Tensor) -> float:
    mean = ExactMean(CPU)
    for chunk in chunks:
        mean.add(chunk)
    return mean.mean()


def test_order_and_grouping_change_nothing() -> None:
    terms = torch.rand(1001, generator=torch.Generator().manual_seed(0)) * 10
    whole = mean_of(terms)
    assert mean_of(*terms.flip(0).split(7)) == whole
    assert mean_of(*terms[torch.randperm(1001)].split(100)) == whole
    assert whole == pytest.approx(terms.double().mean().item(), abs=2**-25)


def test_goes_on_from_earlier_sums() -> None:
    terms = torch.rand(10)
    first = ExactMean(CPU)
    first.add(terms[:4])
    second = ExactMean(CPU, first.sums())
    second.add(terms[4:])
    assert second.mean() == mean_of(terms)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_term_spoils_the_mean(bad: float) -> None:
    assert math.isnan(mean_of(torch.tensor([1.0, bad]), torch.tensor(2.0)))


def test_huge_terms_do_not_overflow() -> None:
    mean = mean_of(torch.full((1000,), 3e38))
    assert math.isfinite(mean)
    assert mean > 1e6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_terms_stay_what_they_are(dtype: torch.dtype) -> None:
    terms = torch.tensor([0.5, 2.0], dtype=dtype)
    assert mean_of(terms) == 1.25
    assert terms.tolist() == [0.5, 2.0]


def test_no_term_no_mean() -> None:
    assert math.isnan(mean_of())
