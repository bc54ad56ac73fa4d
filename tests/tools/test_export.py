"""The command ``ecoformer export`` builds the model that the weights are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ecoformer.__main__ import main
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import find_family

VIT = "vit_tiny_patch16_224"
SIZES = {"depth": 1, "embed_dim": 24, "num_heads": 3}


def save(path: Path, variant: str, attention: str, **keywords: int) -> Path:
    model = find_family(variant).create_model(
        variant, attention, input_size=48, num_classes=7, **keywords
    )
    torch.save({"model": with_random_hash_functions(model).state_dict()}, path)
    return path


def export(weights: Path, variant: str, attention: str, *flags: str) -> int:
    words = ["--model", variant, "--attn_type", attention, "--resume", str(weights)]
    return main(["export", *words, "--output", str(weights.with_name("model.pt2")), *flags])


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


def test_weights_of_another_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save(tmp_path / "weights.pth", VIT, "ecoformer", **SIZES)
    assert export(weights, VIT, "ecoformer", "--input-size", "48") == 2
    assert "weights of another model" in capsys.readouterr().err
    assert not (tmp_path / "model.pt2").exists()
