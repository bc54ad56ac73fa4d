"""A data set and a command that train in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NUM_TRAIN, NUM_VAL = 24, 21


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in two classes, of which one is brighter: 24 images to train on and 21 to evaluate."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for split, num_images in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for number in range(num_images):
            label = number % 2
            pixels = random.randint(0, 128, (32, 32, 3)) + 127 * label
            file = root / split / f"class{label}" / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


@pytest.fixture
def tiny_flags(image_folder: Path, tmp_path: Path) -> list[str]:
    """Three steps of eight images an epoch, with a short fit, into a fresh folder."""
    return [
        *("--data-path", str(image_folder), "--output_dir", str(tmp_path / "run")),
        *("--batch-size", "8", "--num-workers", "0", "--no-repeated-aug"),
        *("--input-size", "32", "--num-fit-steps", "2", "--device", "cpu"),
        *("--epochs", "3", "--warmup-epochs", "1"),
    ]
