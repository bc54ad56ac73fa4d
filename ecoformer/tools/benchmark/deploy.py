"""Time the evaluation of exported and compiled models beside timm's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ecoformer.deploy.formats import AotInductor, Format, Onnx, trace
from ecoformer.tools.benchmark.backbones import create_model
from ecoformer.tools.measure import Call, time_interleaved
from ecoformer.tools.table import Column, Row, Table

_MODELS = ("ecoformer", "timm")
# What ratios are of.
_BASELINE = "timm, compiled"


def measure_deployment(
    variant: str,
    batch_size: int,
    sides: Sequence[int],
    *,
    num_rounds: int,
    environment: Mapping[str, str],
) -> Table:
    """Time a PVTv2 and timm's of the same name in each way to deploy them, all of a size in turns.

    Files are made for each of ``sides`` alone, pixels, and run on as many threads as PyTorch.
    """
    Onnx().require()
    AotInductor().require()
    columns = (
        Column("side", "px", spec=".0f"),
        Column("name", ""),
        Column("median_ms", "median, ms", spec=".1f"),
        Column("low_ms", "lower quartile", spec=".1f"),
        Column("high_ms", "upper quartile", spec=".1f"),
        Column("ratio", f"times as fast as {_BASELINE}", spec=".2f"),
    )
    rows = [row for side in sides for row in _measure_side(variant, batch_size, side, num_rounds)]
    notes = [f"Evaluation of {batch_size} images by {variant}, in turns, float32."]
    return Table("Deployed models", columns, rows, notes, environment)


def _measure_side(variant: str, batch_size: int, side: int, num_rounds: int) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch_size, 3, side, side, generator=generator)
    models = {name: create_model(name, variant).eval() for name in _MODELS}
    ways: dict[str, Callable[[nn.Module, Tensor], Call]] = {
        "eager": _run_eager,
        "compiled": _run_compiled,
        "AOTInductor": _run_aoti,
        "ONNX Runtime": _run_onnx,
    }
    torch.compiler.reset()
    calls = {
        f"{name}, {way}": prepare(model, images)
        for way, prepare in ways.items()
        for name, model in models.items()
    }
    timings = time_interleaved(calls, num_rounds=num_rounds, device=images.device)
    baseline_ms = timings[_BASELINE].median_ms
    return [
        {
            "side": side,
            "name": name,
            "median_ms": timing.median_ms,
            "low_ms": timing.low_ms,
            "high_ms": timing.high_ms,
            "ratio": baseline_ms / timing.median_ms,
        }
        for name, timing in timings.items()
    ]


def _run_eager(model: Callable[[Tensor], object], images: Tensor) -> Call:
    return torch.inference_mode()(partial(model, images))


def _run_compiled(model: nn.Module, images: Tensor) -> Call:
    return _run_eager(torch.compile(model), images)


def _run_aoti(model: nn.Module, images: Tensor) -> Call:
    with tempfile.TemporaryDirectory() as folder:
        file = _write(AotInductor(), model, images, folder)
        return _run_eager(torch._inductor.aoti_load_package(str(file)), images)


def _run_onnx(model: nn.Module, images: Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads must not spin on into the next one's turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        file = _write(Onnx(), model, images, folder)
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    return partial(session.run, None, {"input": images.numpy()})


def _write(form: Format, model: nn.Module, images: Tensor, folder: str) -> Path:
    file = Path(folder) / f"model{form.suffix}"
    form.write(trace(model, images, {}), file, {}, ["output"])
    return file
