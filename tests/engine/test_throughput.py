"""Images a second, without a fit and without touching the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pvt
from ecoformer.engine.command import run_command
from ecoformer.engine.throughput import Throughput, measure_throughput
from ecoformer.hashing import hash_layers
from pvt import FAMILY
from tests.engine.training import Classifier


class Counting(Classifier):
    """Knows how often it was called, in which mode."""

    calls: list[bool]

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __deepcopy__(self, memo: object) -> Counting:
        copied = Counting()
        copied.calls = self.calls
        return copied

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(self.training)
        return super().forward(images)


@pytest.mark.parametrize("protocol", ["released", "median"])
def test_fifty_to_warm_up_thirty_timed(protocol: str) -> None:
    model = Counting().train()
    result = measure_throughput(model, [torch.randn(2, 3, 32, 32)], protocol=protocol, batch_size=2)
    assert model.calls == [False] * 80
    assert model.training
    assert 0 < result.low <= result.median <= result.high
    assert (result.low == result.high) == (protocol == "released")


def test_unfitted_model_is_timed_and_stays_unfitted() -> None:
    model = pvt.create_model("pvt_v2_b0", num_classes=2)
    measure_throughput(model, [torch.randn(1, 3, 32, 32)], protocol="released", batch_size=1)
    assert not any(layer.is_fitted for layer in hash_layers(model).values())
    assert all(torch.count_nonzero(layer.weight) == 0 for layer in hash_layers(model).values())


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batch-size", "1", "--input-size", "32", "--device", "cpu", "--throughput"]
    assert run_command(flags, FAMILY) == 0
    said = capsys.readouterr().out
    assert "pvt_v2_b0/ecoformer, batch 1 of 32 px, float32 on cpu: median " in said
    assert run_command([*flags, "released"], FAMILY) == 0
    assert "median" not in capsys.readouterr().out


def test_result_reads_well() -> None:
    assert str(Throughput(10.0, 10.0, 10.0, "images")) == "10.0 images/s"
    spread = Throughput(10.0, 9.0, 12.04, "images")
    assert str(spread) == "median 10.0 images/s, 8 of 10 in 9.0 to 12.0"
