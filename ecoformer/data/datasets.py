"""Labelled images: folders, and the small sets that come as arrays."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
from PIL import Image

from ecoformer.data.digits import SPLITS, load_digits, read_digits
from ecoformer.data.pairs import Pairs
from ecoformer.errors import InputError
from ecoformer.files import open_regular

IMAGE_SETS = ("IMNET", "CIFAR", "FMNIST", "DIGITS", "PAIRS")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Pillow's readers of these alone, whatever a file is called: others start programs (EPS starts
# Ghostscript) or are hardly tested.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
# Of 65,535. An image of 16 bits that ends below holds 12 bits or fewer, and would turn black.
_DIMMEST_16_BIT_WHITE = 4096
DIGIT_CLASSES = tuple(str(digit) for digit in range(10))
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


class Fingerprint(TypedDict):
    """Tells one set of images from another without reading them.

    ``digest`` covers the names of classes and files and the labels, in order; of sequences that are
    made while they are read, the first one.
    """

    num_classes: int
    num_images: int
    digest: str


class LabelledSamples(Protocol):
    """Samples with their labels, read by index."""

    class_names: Sequence[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Any, Any]:
        """Give a sample, and what is to be learned of it, in indices of ``class_names``."""

    def describe(self, index: int) -> str:
        """Name the file, or the set and the sample's number, so that a user finds it."""

    def fingerprint(self) -> Fingerprint:
        """Tell this set from others."""


class LabelledImages(LabelledSamples, Protocol):
    """Images with one label each."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Decode an image, RGB, and give its label, an index of ``class_names``."""


class ImageFolder:
    """Image files in one folder a class, in the order of torchvision's class of this name.

    File names lie in one array: counting references writes to a list of strings, so each worker
    would come to hold a copy of its own, about 200 MB for ImageNet. Hidden files and folders are
    left out; images may lie in folders below a class's.

    Raises:
        InputError: no folder, no class folder, or a class without an image.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with os.scandir(root) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        self.class_names: Sequence[str] = sorted(e.name for e in visible if e.is_dir())
        if not self.class_names:
            found = f"{len(visible)} files but no folder" if visible else "nothing"
            raise InputError(f"{root} holds {found}; expected one folder of images a class.")
        names: list[bytes] = []
        counts: list[int] = []
        for class_name in self.class_names:
            found_names = _find_images(root / class_name)
            names += found_names
            counts.append(len(found_names))
        if 0 in counts:
            first = root / self.class_names[counts.index(0)]
            others = f" (and {counts.count(0) - 1} more)" if counts.count(0) > 1 else ""
            raise InputError(
                f"class folder {first}{others} holds no image ({' '.join(EXTENSIONS)}); add some "
                "or delete it."
            )
        self.names = np.array(names)
        self.labels = np.repeat(np.arange(len(counts)), counts)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Decode an image.

        Raises:
            Exception: what Pillow says of a file that is not a whole image.
        """
        return read_image(self.path(index)), int(self.labels[index])

    def path(self, index: int) -> Path:
        """Name the image's file, the folder's path included."""
        return self.root / self.class_names[self.labels[index]] / os.fsdecode(self.names[index])

    def describe(self, index: int) -> str:
        """Give the path of its file."""
        return str(self.path(index))

    def fingerprint(self) -> Fingerprint:
        """Hash the names and labels, which takes 0.1 s for ImageNet."""
        return _fingerprint(self.class_names, self.labels, self.names)


class ImageArray:
    """Images that fit in memory.

    Args:
        images: [num_images, height, width] or [num_images, height, width, 3], uint8.
        labels: [num_images], integers.
    """

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
    ) -> None:
        self.name = name
        self.images = images
        self.labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Take an image out of the array, as RGB."""
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])

    def by_class(self) -> list[list[int]]:
        """Give the numbers of each class's images."""
        order = np.argsort(self.labels, kind="stable")
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return [part.tolist() for part in np.split(order, np.cumsum(counts)[:-1])]

    def describe(self, index: int) -> str:
        """Give the set's name and the image's number in it."""
        return f"{self.name} image {index}"

    def fingerprint(self) -> Fingerprint:
        """Hash the labels alone."""
        return _fingerprint(self.class_names, self.labels, np.array([self.name.encode()]))


def _fingerprint(class_names: Sequence[str], labels: np.ndarray, names: np.ndarray) -> Fingerprint:
    digest = hashlib.blake2b(digest_size=16)
    for class_name in class_names:
        digest.update(os.fsencode(class_name) + b"\0")
    digest.update(labels.astype("<i8").data)
    # Of one length each, padded with zeros.
    digest.update(np.ascontiguousarray(names).view(np.uint8).data)
    return {
        "num_classes": len(class_names),
        "num_images": len(labels),
        "digest": digest.hexdigest(),
    }


def fingerprint_first(samples: LabelledSamples) -> Fingerprint:
    """Hash the first of sequences [N] that a generator makes: its code and settings tell there."""
    tokens, _ = samples.read(0)
    return {
        "num_classes": len(samples.class_names),
        "num_images": len(samples),
        "digest": hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest(),
    }


def read_image(path: Path) -> Image.Image:
    """Decode a file, whatever its extension says, as RGB of 8 bits.

    Transparency is dropped and no rotation is applied, as torchvision's loader does. Of 16 bits
    the high byte is kept. Where white cannot be known, an image is refused: integers outside of 16
    bits, floating point, and 16 bits of which none reaches 4,096 but some are not 0.

    Raises:
        Exception: what Pillow says of a file that is not a whole image.
    """
    with open_regular(path) as file:
        opened = Image.open(file, formats=FORMATS)
        # Of the pixels in the file; decoding forgets it.
        layout = str(opened.tile[:1])
        image: Image.Image = opened
        if image.mode.startswith("I"):
            image = _take_high_bytes(image, num_bits=12 if "I;12" in layout else 16)
        elif image.mode.startswith("F"):
            raise _unknown_white("its values are floating point")
        elif image.mode == "P" and "transparency" in image.info:
            # The same colours as straight to RGB, without Pillow's warning.
            image = image.convert("RGBA")
        # Decodes; an image that is of this mode already would be copied.
        image.load()
        image = image if image.mode == "RGB" else image.convert("RGB")
        if ";16" in layout and "I;16" not in layout:
            # Pillow has taken the high bytes, so what filled 8 bits is all 0.
            _require_white(256 * int(np.asarray(image).max()))
        return image


def _take_high_bytes(image: Image.Image, num_bits: int) -> Image.Image:
    values = np.asarray(image).astype(np.int32) << (16 - num_bits)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise _unknown_white(f"its values are from {low} to {high}")
    if high and num_bits == 16:
        _require_white(high)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _require_white(high: int) -> None:
    if high < _DIMMEST_16_BIT_WHITE:
        raise _unknown_white(f"its 16-bit values end at {high} of 65535")


def _unknown_white(found: str) -> ValueError:
    return ValueError(f"{found}, so what is white cannot be known: convert it to 8 bits")


def open_dataset(name: str, path: str | None, split: str, *, input_size: int) -> LabelledImages:
    """Open one split of a data set.

    Args:
        name: one of ``IMAGE_SETS``.
        path: folder of the data; ``"DIGITS"`` needs none, nor does ``"PAIRS"`` of digits; that of
            Fashion-MNIST makes pairs of it.
        split: ``"train"`` or ``"val"``.
        input_size: side that digits are enlarged to, and of a canvas of pairs, pixels.

    Raises:
        InputError: the data are not there, or not as they should be.
    """
    assert split in SPLITS
    if name in ("INAT", "INAT19", "IMNET100"):
        raise InputError(
            f"{name} has no reader of its own; lay it out as train/CLASS/*.jpg and "
            "val/CLASS/*.jpg and give --data-set IMNET."
        )
    if name not in IMAGE_SETS:
        raise InputError(
            f"--data-set {name} has no images with one label each; there are: "
            f"{', '.join(IMAGE_SETS)}. For {name} give its --task."
        )
    if name == "DIGITS":
        images, labels = load_digits(split, size=input_size)
        return ImageArray(name, images, labels, DIGIT_CLASSES)
    if name == "PAIRS":
        return Pairs(open_items(name, path or None, split), split, side=input_size)
    if not path:
        raise InputError(f"data set {name} needs its folder; give --data-path.")
    if not os.path.isdir(path):
        raise InputError(f"--data-path {path} is no folder; give the one that holds the data.")
    readers: dict[str, Callable[[Path, str], LabelledImages]] = {
        "IMNET": _open_folder,
        "CIFAR": _open_cifar,
        "FMNIST": _open_fashion,
    }
    try:
        return readers[name](Path(path), split)
    except OSError as error:
        raise InputError(f"cannot read {error.filename} ({error.strerror}).") from error


def open_items(name: str, path: str | None, split: str) -> ImageArray:
    """Open the small grey images that other sets are made of.

    Args:
        name: of the set that is made of them.
        path: folder of Fashion-MNIST; None: they are the digits.
        split: ``"train"`` or ``"val"``.

    Raises:
        InputError: the files are not there, or not as they should be.
    """
    if path is None:
        return ImageArray(name, *read_digits(split), DIGIT_CLASSES)
    images = open_dataset("FMNIST", path, split, input_size=0)
    assert isinstance(images, ImageArray)
    return images


def _open_folder(path: Path, split: str) -> ImageFolder:
    if not (path / split).is_dir():
        raise InputError(f"{path} has no folder {split}/; expected train/ and val/ in --data-path.")
    return ImageFolder(path / split)


def _find_images(folder: Path) -> list[bytes]:
    """List the image files in and below a folder, relative to it, sorted folder by folder.

    A folder that several links lead to is visited once, by the first of its names.
    """
    found: list[tuple[str, str]] = []
    below, visited = [""], {_identify(folder)}
    for inner in below:
        folders = []
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                # Asks no file for its status: the folder's own listing tells what is a folder.
                if entry.is_dir():
                    folders.append((entry.is_symlink(), entry.name))
                elif entry.name.lower().endswith(EXTENSIONS):
                    found.append((inner, entry.name))
        # Links last, and by name: which name of a folder is the first must not depend on the disk.
        for _, name in sorted(folders):
            path = os.path.join(inner, name)
            if (identity := _identify(folder / path)) not in visited:
                visited.add(identity)
                below.append(path)
    return [os.fsencode(f"{inner}/{name}" if inner else name) for inner, name in sorted(found)]


def _identify(folder: os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _open_cifar(path: Path, split: str) -> ImageArray:
    from torchvision.datasets import CIFAR100

    try:
        # It checks the files' digests before it reads them.
        cifar = CIFAR100(str(path), train=split == "train")
    except RuntimeError as error:
        raise InputError(
            f"{path} does not hold the published CIFAR-100 files, whole; unpack "
            f"{CIFAR100.filename} there, so that {path / CIFAR100.base_folder} exists."
        ) from error
    return ImageArray("CIFAR", cifar.data, np.array(cifar.targets), cifar.classes)


def _open_fashion(path: Path, split: str) -> ImageArray:
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx(path, f"{prefix}-images-idx3-ubyte", num_axes=3)
    labels = _read_idx(path, f"{prefix}-labels-idx1-ubyte", num_axes=1)
    if len(images) != len(labels):
        raise InputError(
            f"{path} holds {len(images)} {split} images but {len(labels)} labels; "
            "get the four published files again."
        )
    return ImageArray("FMNIST", images, labels, FASHION_CLASSES)


def _read_idx(folder: Path, name: str, *, num_axes: int) -> np.ndarray:
    """Read bytes in the format of MNIST: 0, 0, type 8, axes, their lengths, the values."""
    files = [file for file in (folder / name, folder / f"{name}.gz") if file.exists()]
    if not files:
        raise InputError(f"{folder} holds no {name}, plain or .gz; expected the published files.")
    try:
        data = files[0].read_bytes()
        content = gzip.decompress(data) if files[0].suffix == ".gz" else data
        header = np.frombuffer(content, np.uint8, 4)
        shape = np.frombuffer(content, ">i4", num_axes, offset=4)
        if header.tolist() != [0, 0, 8, num_axes]:
            raise ValueError("its first bytes are of another format")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{files[0]} is no whole idx file ({error}); get it again.") from error
