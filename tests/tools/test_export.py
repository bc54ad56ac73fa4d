"""The command ``ecoformer export`` builds the model that the weights are of."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ecoformer.__main__ import main
from ecoformer.config import parse_config
from ecoformer.engine.session import create_task
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models import registry
from ecoformer.models.registry import find_family
from ecoformer.tasks.loading import LoadedTask
from tests.deploy.test_exporting import require_tools
from tests.tasks.tiny_pyramid import FAMILY, shrink

VIT = "vit_tiny_patch16_224"
SIZES = {"depth": 1, "embed_dim": 24, "num_heads": 3}


def save(path: Path, variant: str, attention: str, **keywords: int) -> Path:
    model = find_family(variant).create_model(
        variant, attention, input_size=48, num_classes=7, **keywords
    )
    torch.save({"model": with_random_hash_functions(model).state_dict()}, path)
    return path


def export(weights: Path, variant: str, attention: str, *flags: str, suffix: str = ".pt2") -> int:
    words = ["--model", variant, "--attn_type", attention, "--resume", str(weights)]
    output = str(weights.with_name(f"model{suffix}"))
    return main(["export", *words, "--output", output, *flags])


@pytest.mark.parametrize(
    ("variant", "attention", "sizes"),
    [(VIT, "ecoformer", SIZES), ("resnet10t", "msa", {})],
    ids=["sizes of its own", "a classifier of another name"],
)
def test_the_model_is_built_as_its_weights_were(
    variant: str,
    attention: str,
    sizes: dict[str, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = save(tmp_path / "weights.pth", variant, attention, **sizes)
    flags = ["--model-kwargs", *(f"{name}={size}" for name, size in sizes.items())]
    # The one leaves batches free where it fixes sides, the other is exported for one size.
    flags = flags if sizes else ["--fixed"]
    assert export(weights, variant, attention, "--input-size", "48", *flags) == 0
    assert "2 x 3 x 48 x 48: outputs differ by" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert program(torch.randn(2, 3, 48, 48)).shape == (2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".aoti.pt2"])
def test_a_converted_vit_is_written_in_each_format(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is compared in a process that cannot import this package, or not written."""
    require_tools(suffix)
    weights = save(tmp_path / "weights.pth", VIT, "ecoformer", **SIZES)
    keywords = [f"{name}={size}" for name, size in SIZES.items()]
    flags = ["--input-size", "48", "--model-kwargs", *keywords]
    assert export(weights, VIT, "ecoformer", *flags, suffix=suffix) == 0
    said = capsys.readouterr().out
    assert (tmp_path / f"model{suffix}").stat().st_size > 0
    assert "2 x 3 x 48 x 48: outputs differ by" in said and "batch from 1" in said


def test_weights_of_another_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save(tmp_path / "weights.pth", VIT, "ecoformer", **SIZES)
    assert export(weights, VIT, "ecoformer", "--input-size", "48") == 2
    assert "weights of another model" in capsys.readouterr().err
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize(
    ("task", "outputs"),
    [
        # 9 anchors a place on maps of 20 x 24, 10 x 12 and so on, for 5 classes.
        ("detection", {"cls_logits": (2, 5787, 5), "bbox_regression": (2, 5787, 4)}),
        pytest.param("segmentation", {"output": (2, 5, 160, 192)}, marks=pytest.mark.slow),
    ],
)
def test_the_heads_of_a_dense_task_come_along(
    task: str,
    outputs: dict[str, tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For images of any size; what is no tensor stays behind."""
    shrink(monkeypatch)
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES, "tests.tasks.tiny_pyramid"])
    flags = ["--task", task, "--data-set", "SCENES", "--short-side", "160"]
    made = create_task(parse_config([*flags, "--model", "tiny_pyramid"]))
    assert isinstance(made, LoadedTask)
    model = made.build_model(partial(FAMILY.create_model, "tiny_pyramid"), 5)
    model = with_random_hash_functions(model).eval()
    weights = tmp_path / "weights.pth"
    torch.save(model.state_dict(), weights)
    images = torch.randn(2, 3, 160, 192, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images.numpy())
    flags += ["--input", str(tmp_path / "images.npy")]
    assert export(weights, "tiny_pyramid", "ecoformer", *flags) == 0
    assert "any batch from 1, height from" in capsys.readouterr().out
    found = torch.export.load(tmp_path / "model.pt2").module()(images)
    found = found if isinstance(found, dict) else {"output": found}
    assert {name: tuple(value.shape) for name, value in found.items()} == outputs
    with torch.no_grad():
        expected = model(images)
    for name, value in found.items():
        truth = expected if name == "output" else expected[name]
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ({}, ["--task", "sequence", "--model", "encoder"], "--task sequence has others"),
        ({"config": {"task": "detection"}}, ["--model", "pvt_v2_b0"], "of --task detection, not c"),
        ({}, ["--task", "segmentation", "--model", "pvt_v2_b0"], "holds no heads of --task seg"),
    ],
)
def test_weights_of_another_task_are_refused(
    content: dict[str, object],
    flags: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save({"model": {"head.weight": torch.zeros(3, 8)}, **content}, weights)
    output = ["--output", str(tmp_path / "a.pt2")]
    assert main(["export", *flags, *output, "--resume", str(weights)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
