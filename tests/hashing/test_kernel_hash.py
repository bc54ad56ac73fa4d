"""The hash module: what it saves, and that nothing unfitted ever attends."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call

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


def refuses(module: KernelHash) -> bool:
    """Whether it says that it is not fitted."""
    try:
        module(PROBLEM.q, PROBLEM.v)
    except InputError:
        return True
    return False


def test_the_mirror_follows_what_is_copied_into_the_buffers() -> None:
    module, fitted, unfitted = build(None), build(), build(None)
    for source, is_refused in ((fitted, False), (unfitted, True), (fitted, False)):
        for name, buffer in source.named_buffers():
            getattr(module, name).copy_(buffer)
        assert refuses(module) is is_refused
    twin = copy.deepcopy(module)
    twin.is_fitted.fill_(False)
    del module
    assert refuses(twin)


def test_the_mirror_follows_a_functional_call() -> None:
    for module in (build(None), build(), copy.deepcopy(build())):
        is_refused = refuses(module)
        with pytest.raises(InputError, match="not fitted"):
            functional_call(module, dict(build(None).named_buffers()), (PROBLEM.q, PROBLEM.v))
        out = functional_call(module, dict(build().named_buffers()), (PROBLEM.q, PROBLEM.v))
        assert torch.equal(out, build()(PROBLEM.q, PROBLEM.v))
        assert refuses(module) is is_refused


def test_the_flag_is_read_only_where_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    module(PROBLEM.q, PROBLEM.v)
    # Reading waits for a GPU.
    monkeypatch.setattr(KernelHash, "refresh_fitted", lambda self: pytest.fail("read"))
    for _ in range(2):
        module(PROBLEM.q, PROBLEM.v)
        module.weight.mul_(1.0)


HALVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "type": lambda module: module.type(torch.float16),
    "twice": lambda module: module.half().bfloat16(),
}


@pytest.mark.parametrize("convert", HALVES.values(), ids=HALVES)
def test_hash_functions_stay_whole_in_a_model_of_half_precision(
    convert: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.ModuleList([build(), nn.Linear(8, 8)])
    before = copy.deepcopy(model[0].state_dict())
    convert(model)
    assert next(model[1].parameters()).dtype in (torch.bfloat16, torch.float16)
    for name, tensor in model[0].state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    model.double()
    assert model[0].weight.dtype == torch.float64


def test_a_default_type_and_an_assigned_file_of_half_precision_round_nothing_more() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = build()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(module.anchors, PROBLEM.functions["anchors"])
    state = {
        name: t.half() if t.is_floating_point() else t for name, t in build().state_dict().items()
    }
    module.load_state_dict(state, assign=True)
    assert {module.weight.dtype, module.kernel_mean.dtype, module.anchors.dtype} == {torch.float32}


def test_codes_of_a_half_precision_model_flip_with_its_rows_alone() -> None:
    problem = draw_problem(tokens=400, dtype=torch.bfloat16)
    module = build(problem).to(torch.bfloat16)
    assert torch.equal(module.encode(problem.q), build(problem).encode(problem.q.float()))


def test_memory_without_data_is_not_fitted() -> None:
    with torch.device("meta"):
        module = build(None)
    module._apply(lambda tensor: torch.ones_like(tensor, device="cpu"))
    assert refuses(module)
