"""``--compile``: how often a run compiles, with a compiler that only counts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from ecoformer.config.schema import RunConfig
from ecoformer.engine.command import run_command
from ecoformer.engine.launch import process_group
from ecoformer.engine.logs import read_log
from ecoformer.engine.train import _without_sync, build_networks
from ecoformer.ranks import rank
from pvt import FAMILY
from tests.engine.conftest import NUM_VAL
from tests.engine.ranks import run_ranks


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """What ``torch.compile`` hands graphs to."""
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


def test_a_run_compiles_once_to_train_and_once_to_evaluate(
    tiny_flags: list[str],
    tmp_path: Path,
    counter: CompileCounter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The last batch of an evaluation is smaller, and not of one image.
    assert NUM_VAL % 8 > 1
    assert run_command([*tiny_flags, "--epochs", "2", "--compile"], FAMILY) == 0
    assert counter.frame_count == 2

    torch.compiler.reset()
    assert run_command([*tiny_flags, "--eval", "--compile"], FAMILY) == 0
    assert counter.frame_count == 3
    last = read_log(tmp_path / "run")[-1]
    assert f"top-1 {last['test_acc1']:.2f} %" in capsys.readouterr().out.splitlines()[-1]


class Layers(nn.Module):
    """Each has 1 MB, as the first bucket of gradients has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def count_graphs() -> tuple[int, bool, bool]:
    """Graphs that a rank trains in; whether gradients are its own without sync, and the mean."""
    counter = CompileCounter()
    torch.compile = partial(torch.compile, backend=counter)
    torch.manual_seed(0)
    model, images = Layers(), torch.randn(2, 4, 512)
    parameters = list(model.parameters())

    def has_gradient_of(images: Tensor) -> bool:
        expected = torch.autograd.grad(model(images).sum() / (len(images) // 4), parameters)
        gradients = [parameter.grad for parameter in parameters]
        model.zero_grad()
        return all(
            gradient is not None and torch.allclose(gradient, other, atol=1e-5)
            for gradient, other in zip(gradients, expected, strict=True)
        )

    with process_group("cpu") as device:
        _, parallel = build_networks(model, RunConfig(compile=True), device)
        own = images[rank()]
        with _without_sync(parallel):
            parallel(own).sum().backward()
        is_own = has_gradient_of(own)
        parallel(own).sum().backward()
        return counter.frame_count, is_own, has_gradient_of(images.flatten(0, 1))


def test_ranks_sum_gradients_while_others_are_computed() -> None:
    assert run_ranks(count_graphs, 2) == [(2, True, True)] * 2
