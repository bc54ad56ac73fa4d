"""The MLP, against its formula, whole and in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ecoformer.models import mlp as mlp_module
from ecoformer.models.mlp import Mlp
from tests.problems import LargestTensor, draw

SIZE = (3, 5)


@pytest.mark.parametrize("has_relu", [False, True])
@pytest.mark.parametrize("has_dwconv", [False, True])
def test_mlp_is_its_formula(has_dwconv: bool, has_relu: bool) -> None:
    mlp = Mlp(8, 16, has_dwconv=has_dwconv, has_relu=has_relu).double()
    x = draw(2, 15, 8)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    if has_relu:
        hidden = hidden.clamp_min(0)
    if mlp.dwconv is not None:
        conv = mlp.dwconv.dwconv
        image = hidden.mT.reshape(2, 16, *SIZE)
        hidden = F.conv2d(image, conv.weight, conv.bias, padding=1, groups=16).flatten(2).mT
    # The exact GELU, by its definition.
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    torch.testing.assert_close(mlp(x, SIZE), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


# In values of an image's hidden map, 15 tokens by 80 channels: two images, or 32 channels of one.
@pytest.mark.parametrize("num_block_values", [2 * 15 * 80, 15 * 32])
@pytest.mark.parametrize("has_relu", [False, True])
@pytest.mark.parametrize("has_dwconv", [False, True])
def test_blocks_do_not_show(
    num_block_values: int, has_dwconv: bool, has_relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = Mlp(8, 80, has_dwconv=has_dwconv, has_relu=has_relu).double()
    x = draw(5, 15, 8)
    expected = mlp(x, SIZE)
    num_blocks, mix_part = 0, Mlp._mix_part

    def count(self: Mlp, x: torch.Tensor, size: tuple[int, int], part: slice) -> torch.Tensor:
        nonlocal num_blocks
        num_blocks += 1
        return mix_part(self, x, size, part)

    monkeypatch.setattr(mlp_module, "_MAX_WHOLE_MAP", 1000)
    monkeypatch.setattr(mlp_module, "_BLOCK_VALUES_PER_THREAD", num_block_values)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(Mlp, "_mix_part", count)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x, SIZE), expected)
    assert num_blocks == (3 if num_block_values == 2 * 15 * 80 else 5 * 3)


class Doubled(nn.Linear):
    """A layer that a user put in the place of another, as adapters do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def spy(layer: nn.Module, called: list[nn.Module]) -> None:
    """Patch one layer's forward, as tools that move layers between devices do."""
    forward = layer.forward
    layer.forward = lambda *args: [called.append(layer), forward(*args)][1]  # type: ignore


@pytest.mark.parametrize("name", ["fc1", "dwconv", "dwconv.dwconv", "act", "fc2"])
@pytest.mark.parametrize("way", ["hook", "patch"])
def test_watched_layers_are_called_once(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_module, "_MAX_WHOLE_MAP", 0)
    mlp, called = Mlp(8, 96, has_dwconv=True), list[nn.Module]()
    layer = mlp.get_submodule(name)
    if way == "hook":
        layer.register_forward_hook(lambda *_: called.append(layer))
    else:
        spy(layer, called)
    with torch.no_grad():
        mlp(torch.randn(2, 15, 8), SIZE)
    assert called == [layer]


@pytest.mark.parametrize(
    ("name", "layer"),
    [("fc1", Doubled(8, 96)), ("fc2", nn.Linear(96, 8, bias=False)), ("act", nn.Softmax(-1))],
)
def test_replaced_layers_are_called(
    name: str, layer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp, x = Mlp(8, 96, has_dwconv=True).double(), draw(2, 15, 8)
    setattr(mlp, name, layer.double())
    expected = mlp(x, SIZE)
    monkeypatch.setattr(mlp_module, "_MAX_WHOLE_MAP", 0)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x, SIZE), expected)


def test_blocks_drop_values_and_keep_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_module, "_MAX_WHOLE_MAP", 0)
    mlp, x = Mlp(8, 16, drop=0.5).double(), draw(2, 15, 8)
    with torch.no_grad():
        assert not torch.equal(mlp(x, SIZE), mlp.eval()(x, SIZE))
    assert torch.autograd.grad(mlp(x, SIZE).sum(), mlp.fc1.weight)[0].any()


def test_autocast_gives_blocks_the_dtype_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = Mlp(8, 96, has_dwconv=True), torch.randn(2, 15, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = mlp(x, SIZE)
        monkeypatch.setattr(mlp_module, "_MAX_WHOLE_MAP", 0)
        torch.testing.assert_close(mlp(x, SIZE), expected, atol=2e-2, rtol=2e-2)


def test_a_single_image_stays_channels_last() -> None:
    mlp = Mlp(8, 16, has_dwconv=True)
    # PyTorch falls back to another layout, several times slower, where strides leave it a doubt.
    convolution, seen = mlp.get_submodule("dwconv.dwconv"), list[torch.Tensor]()
    convolution.register_forward_hook(lambda _, args, out: seen.extend([*args, out]))
    mlp(torch.randn(1, 16, 8), (4, 4))
    image, out = seen
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert out.stride() == image.stride()


class OnSize(nn.Module):
    """An MLP as exporters take it, from one tensor."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x, SIZE)


def run_recorded(way: str, mlp: Mlp, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Record an MLP and run the graph: its output, and the values of its largest tensor."""
    largest = LargestTensor()

    def run_graph(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        def run(*args: torch.Tensor) -> object:
            with largest:
                return graph(*args)

        return run

    if way == "compile":
        return torch.compile(OnSize(mlp), backend=run_graph, fullgraph=True)(x), largest.numel
    graph = (
        torch.jit.trace(OnSize(mlp), x)
        if way == "trace"
        else torch.export.export(OnSize(mlp), (x,)).module()
    )
    with largest:
        return graph(x), largest.numel


@pytest.mark.parametrize("has_dwconv", [False, True])
@pytest.mark.parametrize("way", ["compile", "export", "trace"])
def test_graphs_make_no_whole_hidden_map(way: str, has_dwconv: bool) -> None:
    mlp, x = Mlp(8, 96, has_dwconv=has_dwconv, has_relu=has_dwconv), draw(5, 15, 8).float()
    with torch.no_grad():
        out, numel = run_recorded(way, mlp, x)
        torch.testing.assert_close(out, mlp(x, SIZE))
    # A part, here of 16 channels; a convolution may pad it.
    assert numel <= 2 * 5 * 15 * 16


@pytest.mark.parametrize("way", ["compile", "export"])
def test_graphs_call_replaced_and_watched_layers(way: str) -> None:
    mlp, x = Mlp(8, 96, has_dwconv=True), draw(5, 15, 8).float()
    mlp.fc1 = Doubled(8, 96)
    mlp.get_submodule("fc2").register_forward_hook(lambda *args: 3 * args[2])
    with torch.no_grad():
        torch.testing.assert_close(run_recorded(way, mlp, x)[0], mlp(x, SIZE))


def test_a_graph_with_gradients_is_whole() -> None:
    mlp, x = Mlp(8, 96, has_dwconv=True), draw(5, 15, 8).float()
    out, numel = run_recorded("compile", mlp, x)
    assert numel >= 5 * 15 * 96
    torch.testing.assert_close(out, mlp(x, SIZE))
    assert torch.autograd.grad(out.sum(), mlp.fc1.weight)[0].any()


class Packed(torch.Tensor):
    """A weight that is multiplied whole, and cannot be sliced, as packed and quantized ones."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            raise NotImplementedError("no part of a block can be taken")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_packed_weights_are_used_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = Mlp(8, 96, has_dwconv=True).double(), draw(2, 15, 8)
    expected = mlp(x, SIZE)
    layer = mlp.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    monkeypatch.setattr(mlp_module, "_MAX_WHOLE_MAP", 0)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x, SIZE), expected)


def test_weights_that_torchao_quantized_in_blocks_are_used_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    mlp, x = Mlp(64, 192, has_dwconv=True), torch.randn(2, 15, 64)
    expected = mlp(x, SIZE)
    blocks = quantization.granularity.PerGroup(64)
    quantization.quantize_(mlp, quantization.IntxWeightOnlyConfig(torch.int8, blocks))
    with torch.no_grad():
        whole = mlp(x, SIZE)
        assert not torch.equal(whole, expected)
        monkeypatch.setattr(mlp_module, "_MAX_WHOLE_MAP", 0)
        monkeypatch.setattr(mlp_module, "_BLOCK_VALUES_PER_THREAD", 15 * 32)
        torch.testing.assert_close(mlp(x, SIZE), whole)
