"""Exported files compute what their models do, in a process that cannot import this package."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import ecoformer
import pvt
import twins
from ecoformer.deploy import ExportReport, MismatchError, formats
from ecoformer.deploy.checking import _TIE, _compare, _Replay
from ecoformer.hashing import hash_layers, with_random_hash_functions
from tests.tiny import TINY_HASH, TinyModel, draw_images

SUFFIXES = [form.suffix for form in formats.FORMATS]
MODELS = ["pvt_v2_b0", "pvt_v2_b2", "alt_gvt_small", "pcpvt_small_v0"]

# In a process of its own: a loader, and what a file gives for a batch.
RUN = {
    ".onnx": "import onnxruntime; s = onnxruntime.InferenceSession(file); "
    "out = s.run(None, {'input': x})[0]",
    ".pt2": "import torch; out = torch.export.load(file).module()(torch.from_numpy(x)).detach()",
    ".aoti.pt2": "import torch; out = torch._inductor.aoti_load_package(file)(torch.from_numpy(x))",
}


def make_tiny() -> nn.Module:
    model = TinyModel()
    ecoformer.fit_hash_functions(model, draw_images(), torch.Generator().manual_seed(0))
    return model


def require_tools(suffix: str) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    try:
        formats.find_format(Path(f"model{suffix}")).require()
    except ecoformer.InputError as error:
        pytest.skip(str(error))


def run_elsewhere(file: Path, images: Tensor, folder: Path) -> Tensor:
    np.save(folder / "x.npy", images.numpy())
    suffix = next(suffix for suffix in SUFFIXES if file.name.endswith(suffix))
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('ecoformer', 'pvt', 'twins')))\n"
        f"import numpy as np; file, x = {str(file)!r}, np.load('x.npy')\n"
        f"{RUN[suffix]}\nnp.save('out.npy', out)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder)
    return torch.from_numpy(np.load(folder / "out.npy"))


def assert_reloads(model: nn.Module, example: Tensor, suffix: str, folder: Path) -> ExportReport:
    require_tools(suffix)
    file = folder / f"model{suffix}"
    report = ecoformer.export(model, example, file)
    sizes = {row.shape[2:] for row in report.comparisons}
    batch_sizes = {row.shape[0] for row in report.comparisons}
    assert len(sizes) == 3 and len(batch_sizes) >= 2
    assert list(report.axes) == ["batch", "height", "width"]
    for row in report.comparisons:
        assert row.difference <= 1e-4
        assert (row.num_codes > 0) == bool(hash_layers(model) and suffix != ".aoti.pt2")
    # A size that the export has not tried.
    images = torch.randn(2, 3, 70, 101, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(images)
    torch.testing.assert_close(run_elsewhere(file, images, folder), expected, rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in folder.iterdir()) == [file.name, "out.npy", "x.npy"]
    return report


@pytest.mark.parametrize(
    "suffix", [".onnx", ".pt2", pytest.param(".aoti.pt2", marks=pytest.mark.slow)]
)
def test_a_file_of_any_size_runs_without_this_package(suffix: str, tmp_path: Path) -> None:
    model = make_tiny().train()
    model.get_submodule("blocks").eval()
    modes = [module.training for module in model.modules()]
    assert_reloads(model, draw_images(1), suffix, tmp_path)
    assert [module.training for module in model.modules()] == modes
    # Neither somebody's images nor paths of a machine.
    assert b"tests/tiny.py" not in (tmp_path / f"model{suffix}").read_bytes()
    if suffix == ".pt2":
        assert torch.export.load(tmp_path / "model.pt2").example_inputs is None


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("attention", ["ecoformer", "msa"])
@pytest.mark.parametrize("name", MODELS)
def test_backbones_run_without_this_package(
    name: str, attention: str, suffix: str, tmp_path: Path
) -> None:
    create: Any = pvt.create_model if name.startswith("pvt") else twins.create_model
    model = with_random_hash_functions(create(name, attention))
    report = assert_reloads(model, draw_images(2, 64, 96), suffix, tmp_path)
    # The last map has two pixels a side: see the README on exports.
    least = 33 if name.startswith("pvt") else 64
    assert report.axes == {"batch": 1, "height": least, "width": least}


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_a_converted_model_of_whole_patches_runs_without_this_package(
    suffix: str, tmp_path: Path
) -> None:
    require_tools(suffix)
    model = timm.create_model("test_vit", img_size=32, num_classes=7, depth=1).eval()
    assert ecoformer.convert(model, TINY_HASH).converted
    ecoformer.fit_hash_functions(model, draw_images(4, 32, 32), torch.Generator().manual_seed(0))
    file = tmp_path / f"model{suffix}"
    report = ecoformer.export(model, draw_images(2, 32, 32), file)
    # This one interpolates its positions, and takes sides of 16, 32, 48 ... alone.
    assert report.axes == {"batch": 1, "height": 32, "width": 32}
    assert [row.shape for row in report.comparisons[1:]] == [(1, 3, 32, 32), (3, 3, 64, 64)]
    assert all(row.difference <= 1e-4 and row.num_codes for row in report.comparisons)
    images = draw_images(5, 48, 64, seed=1)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(
        run_elsewhere(file, images, tmp_path), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_a_fixed_file_takes_the_sizes_of_the_example_alone(tmp_path: Path) -> None:
    report = ecoformer.export(make_tiny(), draw_images(), tmp_path / "a.pt2", dynamic=False)
    assert not report.axes and len(report.comparisons) == 1
    assert "the sizes of the example alone" in str(report)


def test_a_file_with_other_codes_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_tiny()
    hash_layers(other)["blocks.1.attn.hash"].weight[:, 2] *= -1
    program = formats.trace(other.eval(), draw_images(), {})
    monkeypatch.setattr(
        formats.Pt2, "write", lambda self, _, file, *__: torch.export.save(program, file)
    )
    with pytest.raises(MismatchError, match=r"codes .* are no ties: 2 x 3 x 16 x 24: outputs"):
        ecoformer.export(make_tiny(), draw_images(), tmp_path / "a.pt2", dynamic=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [2e-4, math.nan])
def test_outputs_may_differ_by_rounding_alone(error: float) -> None:
    model, images = make_tiny().eval(), draw_images()
    with torch.no_grad():
        logits = model(images)
    assert _compare(model, images, logits + 1e-5, []).difference <= 2e-5
    logits[1, 0] += error * logits.abs().max()
    with pytest.raises(MismatchError, match="differs by more than rounding: 2 x 3 x 16 x 24"):
        _compare(model, images, logits, [])


def test_codes_of_a_file_may_differ_at_ties() -> None:
    model, images = TinyModel(depth=1).eval(), draw_images()
    ecoformer.fit_hash_functions(model, images)
    layer = hash_layers(model)["blocks.0.attn.hash"]
    layer.weight[:, 2] = 0  # 0 is encoded as -1
    rows: list[Tensor] = []
    with torch.no_grad(), _Replay(model, []) as own:
        hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
        expected = model(images)
        hook.remove()
        bits = layer.encode(rows[0]).mT > 0
    assert own.num_calls == 1 and own.nearest.tolist() == [0, 0]

    def replay(bits: Tensor) -> tuple[Tensor, _Replay]:
        with torch.no_grad(), _Replay(model, [bits]) as replay:
            return model(images), replay

    out, same = replay(bits)
    torch.testing.assert_close(out, expected)
    assert same.num_flipped == 0
    bits[:, :, 2, ::2] = True
    out, tied = replay(bits)
    assert not torch.allclose(out, expected, atol=1e-4)
    assert tied.num_flipped == bits[:, :, 2, ::2].numel() and tied.farthest <= _TIE
    bits[0, 0, 1, 0] = ~bits[0, 0, 1, 0]
    assert replay(bits)[1].farthest > _TIE


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, self.weight * images


def forget(name: str) -> Any:
    import importlib.util

    find = importlib.util.find_spec
    return lambda module, package=None: None if module == name else find(module, package)


def test_bad_input_is_refused_in_one_line_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, images = make_tiny(), draw_images()
    small = with_random_hash_functions(pvt.create_model("pvt_v2_b0", num_classes=10))
    cases: list[tuple[nn.Module, Any, str, str]] = [
        (TinyModel(), images, "a.pt2", "blocks.0.attn.hash: the hash functions are not fitted"),
        (fitted, images, "a.tflite", "no known format; name the file NAME.onnx for ONNX Runtime"),
        (fitted, images[0], "a.pt2", "a batch of images, a tensor"),
        (fitted, images.double(), "a.pt2", "export takes a float32 model and example"),
        (fitted, images.to("meta"), "a.pt2", "on the CPU, not on cpu, meta"),
        (fitted, images[..., :3], "a.pt2", "a map of 16 x 3 is smaller than a patch"),
        (
            Pair(),
            images,
            "a.pt2",
            "output is one tensor, or some by name in a mapping, not a tuple",
        ),
        (small, images[..., :16, :16], "a.pt2", "16 x 16 pixels is too small to export for all"),
        (fitted, images, "a.onnx", "need more libraries: pip install onnxscript"),
        (fitted, images, "a.aoti.pt2", "need a C\\+\\+ compiler: install g"),
    ]
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("ecoformer.deploy.formats.importlib.util.find_spec", forget("onnxscript"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    for model, example, name, words in cases:
        with pytest.raises(ecoformer.InputError, match=words) as caught:
            ecoformer.export(model, example, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
