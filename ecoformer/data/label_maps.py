"""Folders of images and label maps, in ADE20K's layout.

``images/{training,validation}/NAME.jpg`` and ``annotations/{training,validation}/NAME.png``, of 8
bits: 0 is no class, and ignored, v is class v - 1. Classes are named, one a line, by
``objectInfo150.txt``, as in the published archive, or ``classes.txt``; without, there are 150.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ecoformer.data.datasets import EXTENSIONS, Fingerprint, LabelledSamples, read_image
from ecoformer.errors import InputError
from ecoformer.files import open_regular

# In a map: no class, not counted.
IGNORED = 255
_FOLDERS = {"train": "training", "val": "validation"}
_NUM_CLASSES = 150


class LabelMaps(LabelledSamples, Protocol):
    """Images with a label a pixel."""

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Give an image, RGB, and its map [height, width], uint8: labels, or 255 for none."""


class LabelMapFolder:
    """One split of such a folder.

    Raises:
        InputError: a folder is not there, or an image lacks its map, or a map its image.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.root = root
        self.images = root / "images" / _FOLDERS[split]
        self.maps = root / "annotations" / _FOLDERS[split]
        images, maps = _list(self.images, EXTENSIONS), _list(self.maps, (".png",))
        alone = [self.images / images[stem] for stem in sorted(images.keys() - maps.keys())]
        alone += [self.maps / maps[stem] for stem in sorted(maps.keys() - images.keys())]
        if alone:
            raise InputError(
                f"{alone[0]}, and {len(alone) - 1} others, have no partner; expected a map in "
                f"{self.maps} for each image in {self.images}, of the same name."
            )
        if not images:
            raise InputError(f"{self.images} holds no image ({' '.join(EXTENSIONS)}).")
        self.names = np.array([os.fsencode(images[stem]) for stem in sorted(images)])
        self.map_names = np.array([os.fsencode(maps[stem]) for stem in sorted(images)])
        self.class_names: Sequence[str] = _read_classes(root)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Decode both files.

        Raises:
            Exception: what Pillow says of a file that is not a whole image.
            InputError: the map is none of this image or of these classes.
        """
        image = read_image(Path(self.describe(index)))
        map_path = self.maps / os.fsdecode(self.map_names[index])
        labels = _read_map(map_path)
        if labels.shape != (image.height, image.width):
            raise InputError(
                f"its map {map_path} has {labels.shape[1]} x {labels.shape[0]} pixels, not "
                f"{image.width} x {image.height}"
            )
        highest = int(labels.max())
        if highest > len(self.class_names):
            raise InputError(
                f"its map {map_path} holds class id {highest}, of {len(self.class_names)} classes"
            )
        # 0 becomes 255.
        return image, labels - np.uint8(1)

    def describe(self, index: int) -> str:
        return str(self.images / os.fsdecode(self.names[index]))

    def fingerprint(self) -> Fingerprint:
        names = [os.fsencode(name) for name in self.class_names]
        digest = hashlib.blake2b(b"\0".join([*names, *self.names]), digest_size=16)
        return {
            "num_classes": len(names),
            "num_images": len(self),
            "digest": digest.hexdigest(),
        }


def open_label_map_folder(path: str, split: str) -> LabelMapFolder:
    """Open one split, ``"train"`` or ``"val"``.

    Raises:
        InputError: it is not there, or not as it should be.
    """
    return LabelMapFolder(Path(path), split)


def _list(folder: Path, extensions: tuple[str, ...]) -> dict[str, str]:
    """Map the names of files without their ending to those with it."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise InputError(
            f"cannot read {folder} ({error.strerror}); expected images/ and annotations/ in "
            "--data-path, each with training/ and validation/, as in ADE20K."
        ) from error
    found: dict[str, str] = {}
    for name in sorted(names):
        if name.startswith(".") or not name.lower().endswith(extensions):
            continue
        stem = Path(name).stem
        if stem in found:
            raise InputError(f"{folder / name} has the name of {found[stem]} there; expected one.")
        found[stem] = name
    return found


def _read_map(path: Path) -> np.ndarray:
    with open_regular(path) as file:
        try:
            opened = Image.open(file, formats=["PNG"])
            opened.load()
        # Pillow raises whatever its decoder meets.
        except Exception as error:
            raise InputError(f"its map {path} is no whole PNG file") from error
        # Grey values, or places in a palette.
        if opened.mode not in ("L", "P"):
            raise InputError(f"its map {path} has mode {opened.mode}; expected 8 bits a pixel")
        return np.asarray(opened)


def _read_classes(root: Path) -> Sequence[str]:
    for name in ("objectInfo150.txt", "classes.txt"):
        file = root / name
        if not file.exists():
            continue
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {file} ({error}).") from error
        # ADE20K's has a heading, and names in the last of its columns.
        lines = lines[name == "objectInfo150.txt" :]
        names = [line.split("\t")[-1].strip() for line in lines if line.strip()]
        if not 1 <= len(names) < IGNORED:
            raise InputError(f"{file} names {len(names)} classes; expected 1 to {IGNORED - 1}.")
        return names
    return [str(number) for number in range(1, _NUM_CLASSES + 1)]
