"""A command that trains a tiny EcoFormer in a second, saves before every step and fits twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.conftest import image_folder as image_folder
from tests.reliability.runs import Run, run


@pytest.fixture(scope="session")
def flags(image_folder: Path) -> list[str]:
    """Three epochs of three steps; epochs 0 and 2 begin with a fit of two layers."""
    return [
        *("--data-path", str(image_folder), "--batch-size", "8", "--num-workers", "0"),
        *("--no-repeated-aug", "--input-size", "32", "--device", "cpu", "--lr", "0.05"),
        *("--nbits", "4", "--anchor", "6", "--topk", "3", "--num-fit-steps", "3", "--k", "2"),
        *("--epochs", "3", "--warmup-epochs", "1", "--amp-dtype", "float16"),
        *("--checkpoint-every", "1e-6"),
    ]


@pytest.fixture(scope="session")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What nothing interrupted."""
    return run(flags, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def pair_flags(flags: list[str]) -> list[str]:
    """The same for two ranks, in full precision: with a scaler, gradients may overflow."""
    return [*flags, "--batch-size", "4", "--amp-dtype", "none"]


@pytest.fixture(scope="session")
def whole_pair(pair_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What nothing interrupted, on two ranks."""
    return run(pair_flags, tmp_path_factory.mktemp("pair"), world_size=2)
