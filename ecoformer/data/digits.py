"""Real handwritten digits that come with scikit-learn: a data set without a download."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ecoformer.errors import InputError

SPLITS = ("train", "val")
NUM_DIGITS = 1797
NUM_VALIDATION = 360


def read_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one split of the 1,797 digits.

    The split is drawn once, from the generator of seed 0: 1,437 digits to train, 360 to validate,
    by the same writers.

    Returns:
        Images [num_images, 8, 8], uint8, white on black, and labels [num_images], int64.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    from sklearn.datasets import load_digits as load

    digits = load()
    order = np.random.RandomState(0).permutation(NUM_DIGITS)
    chosen = order[:NUM_VALIDATION] if split == "val" else order[NUM_VALIDATION:]
    pixels = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
    return pixels, digits.target[chosen]


def load_digits(split: str, *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one split, each digit enlarged to ``size`` pixels a side, with a narrow border."""
    pixels, labels = read_digits(split)
    # Strokes touch the edge, which evaluation crops: a border of one pixel keeps them whole.
    images = [Image.fromarray(image) for image in np.pad(pixels, ((0, 0), (1, 1), (1, 1)))]
    enlarged = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in enlarged]), labels


def write_digits_folder(root: Path, *, size: int) -> Path:
    """Write the digits as PNG files, one folder a class in train/ and val/, unless they are there.

    The folder appears whole or not at all, also where several processes write it at once.

    Raises:
        InputError: ``root`` holds something else.
    """
    if _holds_digits(root, size):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, ignore_cleanup_errors=True) as partial:
            for split in SPLITS:
                _write_split(Path(partial, root.name, split), split, size)
            os.rename(Path(partial, root.name), root)
    except OSError as error:
        # Another process may have been faster.
        if not _holds_digits(root, size):
            raise InputError(
                f"cannot write the digits to {root} ({error.strerror}); "
                "delete what is there or name another folder."
            ) from error
    return root


def _write_split(folder: Path, split: str, size: int) -> None:
    for number, (image, label) in enumerate(zip(*load_digits(split, size=size), strict=True)):
        file = folder / str(label) / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


def _holds_digits(root: Path, size: int) -> bool:
    files = list(root.glob("*/*/*.png"))
    if len(files) != NUM_DIGITS:
        return False
    with Image.open(files[0], formats=["PNG"]) as image:
        return image.size == (size, size)
