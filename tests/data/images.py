"""Image files to test with: plain ones, and every kind of broken one."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(root: Path, num_train: int, num_val: int) -> Path:
    """Images of one colour each, 2 * number, in two classes."""
    for split, num_images in (("train", num_train), ("val", num_val)):
        for number in range(num_images):
            file = root / split / "ab"[number % 2] / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 44), (2 * number,) * 3).save(file)
    return root


def write_idx(file: Path, values: np.ndarray, *, header: tuple[int, ...] | None = None) -> None:
    numbers = header or (0, 0, 8, values.ndim)
    data = struct.pack(f">4B{values.ndim}i", *numbers, *values.shape) + values.tobytes()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_fashion(folder: Path, train: np.ndarray, held_out: np.ndarray) -> Path:
    """The four files of Fashion-MNIST, of images [n, 28, 28], uint8, in ten classes by turns."""
    for prefix, images in (("train", train), ("t10k", held_out)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        labels = (np.arange(len(images)) % 10).astype(np.uint8)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return folder


def png_of(width: int, height: int) -> bytes:
    """A small file that says it is this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def jpeg() -> bytes:
    """A whole one, of noise."""
    buffer = io.BytesIO()
    Image.effect_noise((48, 44), 80).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


BAD_IMAGES = {
    "no bytes": b"",
    "one byte": b"\xff",
    "cut short": jpeg()[:900],
    "cut in the header": jpeg()[:100],
    "text": b"not an image\n",
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "noise": np.random.RandomState(0).bytes(3000),
    "noise after a header": jpeg()[:20] + np.random.RandomState(1).bytes(2000),
    "decompression bomb": png_of(60000, 60000),
    "no pixels": png_of(48, 44),
    "damaged checksum": png_of(48, 44)[:30] + b"\0" + png_of(48, 44)[31:],
    "dangling link": None,
}


def spoil(file: Path, data: bytes | None) -> None:
    """Put one of ``BAD_IMAGES`` in a file's place."""
    file.unlink()
    if data is None:
        file.symlink_to(file.with_name("gone"))
    else:
        file.write_bytes(data)
