"""The fit, the codes and the attention against figures of the released implementation.

Both the shipped operations and the dense reference have to give them: the reference is what all
other tests compare with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecoformer import ops
from ecoformer.hashing import fit_hash
from ecoformer.ops import reference

_FILE = Path(__file__).parents[1] / "golden" / "hash_learning.json"
CASES = {case["seed"]: case for case in json.loads(_FILE.read_text())["cases"]}


@dataclass(frozen=True)
class Solution:
    """One implementation's answer to a case: all that the file holds figures of."""

    first_weight: Tensor
    weight: Tensor
    kernel_mean: Tensor
    codes: Tensor
    out: Tensor
    grad_q: Tensor
    grad_v: Tensor


def solve_case(case: dict[str, Any], *, is_reference: bool) -> Solution:
    """Draw a case as it was drawn when it was measured, fit, attend and go back."""
    random = np.random.RandomState(case["seed"])
    images, heads, tokens, dim = (case[k] for k in ("batch", "heads", "tokens", "head_dim"))
    shape = (images, heads, tokens, dim)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape)

    def as_tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.float32))

    q = as_tensor(draw(*shape) + 0.7 * draw(images, heads, 1, dim)).requires_grad_()
    v = as_tensor(draw(*shape)).requires_grad_()
    first_weight = as_tensor(draw(heads, case["nbits"], case["anchors"]))
    anchor_tokens = random.permutation(tokens)[: case["anchors"]]
    assert anchor_tokens.tolist() == case["anchor_tokens"]

    x = normalize(q.detach(), dim=-1)
    anchors = x[0, :, anchor_tokens]
    settings: dict[str, Any] = {"num_similar": case["topk"], "num_steps": case["iterations"]}
    implementation: Any = reference if is_reference else ops
    if is_reference:
        weight, mean = reference.fit_hash(x, anchors=anchors, weight=first_weight, **settings)
    else:
        fit = fit_hash(x, anchors=anchors, weight=first_weight, **settings)
        weight, mean = fit.weight, fit.kernel_mean
    functions: dict[str, Any] = {"anchors": anchors, "weight": weight, "kernel_mean": mean}
    codes = implementation.encode(x, **functions)
    out = implementation.kernelized_hash_attention(q, v, **functions)
    (out * as_tensor(draw(*shape))).sum().backward()
    assert q.grad is not None and v.grad is not None
    return Solution(first_weight, weight, mean, codes, out.detach(), q.grad, v.grad)


@pytest.fixture(scope="module", params=CASES, ids=lambda seed: f"seed {seed}")
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


@pytest.fixture(scope="module", params=[False, True], ids=["shipped", "reference"])
def solution(request: pytest.FixtureRequest, case: dict[str, Any]) -> Solution:
    return solve_case(case, is_reference=request.param)


def test_learned_functions(case: dict[str, Any], solution: Solution) -> None:
    assert solution.first_weight[0, 0, :3].tolist() == case["A0_first"]
    assert (solution.weight - torch.tensor(case["A"])).abs().max() <= 1e-5
    assert (solution.kernel_mean - torch.tensor(case["mvec"])).abs().max() <= 1e-5


def test_which_rows_moved(case: dict[str, Any], solution: Solution) -> None:
    has_moved = (solution.weight != solution.first_weight).any(-1)
    assert int(has_moved.sum()) == case["bits_changed"]


def test_codes(case: dict[str, Any], solution: Solution) -> None:
    is_positive = solution.codes > 0  # [B, H, N, K]
    assert is_positive.sum((0, 2)).tolist() == case["codes_positive"]
    assert solution.codes[0, 0, 0].tolist() == case["codes_first_row"]
    bits = ["".join(str(int(bit)) for bit in token) for token in is_positive[0, 0].tolist()]
    assert [f"{int(word, 2):x}" for word in bits] == case["codes_hex"]


def test_output(case: dict[str, Any], solution: Solution) -> None:
    first = torch.tensor(case["out_first"])
    torch.testing.assert_close(solution.out[0, 0, :2], first, rtol=1e-4, atol=1e-6)
    assert solution.out.sum().item() == pytest.approx(case["out_sum"], abs=1e-4)
    assert solution.out.norm().item() == pytest.approx(case["out_l2"], rel=1e-5)


@pytest.mark.parametrize("name", ["qk", "v"])
def test_gradients(name: str, case: dict[str, Any], solution: Solution) -> None:
    grad = solution.grad_q if name == "qk" else solution.grad_v
    assert grad.norm().item() == pytest.approx(case[f"grad_{name}_l2"], rel=1e-4)
    first = torch.tensor(case[f"grad_{name}_first"])
    assert (grad[0, 0, :2] - first).norm() <= 1e-4 * first.norm()
