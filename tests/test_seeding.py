"""Seeds are functions of their parts, and a seeded block leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ecoformer.seeding import derive_seed, seed_everything, seeded

Draw = tuple[float, float, float]


def draw() -> Draw:
    """One number of each generator."""
    return random.random(), float(np.random.random()), torch.rand(()).item()


def test_a_seed_is_the_same_everywhere() -> None:
    # Written down once: a change would make every running experiment draw other numbers.
    assert derive_seed("sample", 0, 3, 17) == 3637793499182798800


def test_seeds_fit_a_generator() -> None:
    for part in range(200):
        seed = derive_seed("range", part)
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)


def test_parts_and_their_order_count() -> None:
    parts = [(1, 2), (2, 1), (12,), (1, 2, 0), ("1", "2x"), (0, 1, 2), (-1, 2)]
    assert len({derive_seed(*each) for each in parts}) == len(parts)


def test_a_seeded_block_draws_what_its_seed_says() -> None:
    draws: list[Draw] = []
    for seed in (5, 5, 6):
        with seeded(seed):
            draws.append(draw())
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


def test_a_seeded_block_leaves_no_trace() -> None:
    seed_everything(1)
    expected = [draw(), draw()]
    seed_everything(1)
    first = draw()
    with seeded(5):
        draw()
    assert [first, draw()] == expected


def test_an_error_inside_leaves_no_trace_either() -> None:
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with pytest.raises(KeyError), seeded(5):
        draw()
        raise KeyError
    assert draw() == expected


def test_everything_is_seeded_alike_in_and_outside_a_block() -> None:
    seed_everything(derive_seed("step", 0))
    outside = draw()
    with seeded(derive_seed("step", 0)):
        assert draw() == outside
