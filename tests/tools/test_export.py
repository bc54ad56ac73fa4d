"""The command ``ecoformer export`` builds the model that the weights are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ecoformer.__main__ import main
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import find_family
from tests.deploy.test_exporting import require_tools

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
