"""The hash module: what it saves, and that nothing unfitted ever attends."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

from ecoformer import HashConfig, InputError, ops
from ecoformer.hashing import KernelHash
from tests.problems import Problem, draw_problem

CONFIG = HashConfig(num_bits=6, num_anchors=5, value_bias="normalized")
PROBLEM = draw_problem(dtype=torch.float32)


def build(problem: Problem | None = PROBLEM) -> KernelHash:
    """A module for the problem's rows, fitted with its functions if there is a problem."""
    module = KernelHash(num_heads=2, head_dim=8, config=CONFIG)
    if problem is not None:
        module.set_functions(**problem.functions)
    return module


def reload(module: KernelHash) -> KernelHash:
    """Save the state dict to a file and load it into a fresh module."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = build(None)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


COPIES: dict[str, Callable[[KernelHash], KernelHash]] = {
    "state dict": reload,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


def test_state_is_four_buffers() -> None:
    module = build(None)
    assert not list(module.parameters())
    assert {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()} == {
        "weight": ((2, 6, 5), torch.float32),
        "kernel_mean": ((2, 5), torch.float32),
        "anchors": ((2, 5, 8), torch.float32),
        "is_fitted": ((), torch.bool),
    }


def test_forward_is_the_operation_with_the_buffers() -> None:
    expected = ops.kernelized_hash_attention(
        PROBLEM.q, PROBLEM.v, **PROBLEM.functions, value_bias="normalized"
    )
    assert torch.equal(build()(PROBLEM.q, PROBLEM.v), expected)


def test_encode_takes_raw_rows() -> None:
    expected = ops.encode(ops.normalize_rows(PROBLEM.q), **PROBLEM.functions)
    assert torch.equal(build().encode(PROBLEM.q), expected)


def test_unfitted_functions_say_what_to_call() -> None:
    for call in (lambda m: m(PROBLEM.q, PROBLEM.v), lambda m: m.encode(PROBLEM.q)):
        with pytest.raises(InputError, match=r"ecoformer\.fit_hash_functions\(model, images\)"):
            call(build(None))


@pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)
def test_a_copy_is_fitted_as_its_original(copy_of: Callable[[KernelHash], KernelHash]) -> None:
    original = build()
    twin = copy_of(original)
    assert torch.equal(twin(PROBLEM.q, PROBLEM.v), original(PROBLEM.q, PROBLEM.v))
    with pytest.raises(InputError):
        copy_of(build(None))(PROBLEM.q, PROBLEM.v)


def test_loading_an_unfitted_state_makes_unfitted() -> None:
    module = build()
    module.load_state_dict(build(None).state_dict())
    with pytest.raises(InputError):
        module(PROBLEM.q, PROBLEM.v)


@pytest.mark.parametrize("is_assigned", [False, True])
def test_loading_works_either_way(is_assigned: bool) -> None:
    with torch.device("meta" if is_assigned else "cpu"):
        module = build(None)
    module.load_state_dict(build().state_dict(), assign=is_assigned)
    assert torch.equal(module(PROBLEM.q, PROBLEM.v), build()(PROBLEM.q, PROBLEM.v))


def test_the_mirror_follows_a_broadcast() -> None:
    module = build(None)
    for name, buffer in build().named_buffers():
        getattr(module, name).copy_(buffer)
    module.refresh_fitted()
    assert torch.equal(module(PROBLEM.q, PROBLEM.v), build()(PROBLEM.q, PROBLEM.v))


def test_attending_changes_no_buffer() -> None:
    module = build()
    before = copy.deepcopy(module.state_dict())
    q = PROBLEM.q.clone().requires_grad_()
    module(q, PROBLEM.v).sum().backward()
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize(
    "bad",
    [
        {"num_bits": 0},
        {"num_bits": 16.5},
        {"num_bits": "16"},
        {"num_anchors": True},
        {"num_anchors": -1},
        {"num_similar": 0},
        {"num_fit_steps": 0},
        {"value_bias": "mean"},
    ],
)
def test_settings_are_checked(bad: dict) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        HashConfig(**bad)
