"""Data sets: read as laid out by those who publish them, and refused in one line otherwise."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import re
import socket
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from torchvision.datasets import CIFAR100
from torchvision.datasets import ImageFolder as TorchvisionFolder

from ecoformer.data.datasets import EXTENSIONS, ImageFolder, open_dataset, read_image
from ecoformer.data.digits import load_digits, write_digits_folder
from ecoformer.errors import InputError
from tests.data.images import write_idx


def write_files(root: Path, *names: str) -> Path:
    """Empty files, with the folders that they lie in."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def refusal(name: str, path: Path | None, split: str = "train") -> str:
    """The one line that opening ends with."""
    with pytest.raises(InputError) as caught:
        open_dataset(name, str(path) if path else None, split, input_size=32)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folder_has_the_order_of_torchvision(tmp_path: Path) -> None:
    names = (
        "b/2.png",
        "b/10.JPEG",
        "b/deep/er/1.webp",
        "b/deep-er/0.bmp",
        "a/notes.txt",
        "a/ü.jpg",
    )
    root = write_files(tmp_path, *names, "b/dee/9.tif", "C/x.jpg", "stray.jpg")
    ours, theirs = ImageFolder(root), TorchvisionFolder(str(root))
    samples = [(str(ours.path(i)), int(ours.labels[i])) for i in range(len(ours))]
    assert samples == theirs.samples
    assert list(ours.class_names) == theirs.classes


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    write_files(tmp_path, "a/1.png", "a/._1.png", "a/.cache/2.png", ".ipynb_checkpoints/3.png")
    folder = ImageFolder(tmp_path)
    assert list(folder.class_names) == ["a"]
    assert [folder.describe(0)] == [str(tmp_path / "a" / "1.png")]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("val/a/1.png",), "has no folder train/"),
        (("train/1.png", "train/2.png"), "train holds 2 files but no folder"),
        (("train/.hidden",), "train holds nothing"),
        (("train/a/1.png", "train/b/notes.txt"), "train/b holds no image ("),
        (("train/a/1.png", "train/b/x", "train/c/x"), "train/b (and 1 more) holds no image ("),
    ],
)
def test_folder_is_refused(tmp_path: Path, files: tuple[str, ...], expected: str) -> None:
    assert expected in refusal("IMNET", write_files(tmp_path, *files))


@pytest.mark.parametrize("name", ["IMNET", "CIFAR", "FMNIST"])
def test_data_path_is_needed(name: str, tmp_path: Path) -> None:
    assert "give --data-path" in refusal(name, None)
    assert f"{tmp_path / 'nowhere'} is no folder" in refusal(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["INAT", "INAT19", "IMNET100"])
def test_inat_is_laid_out_as_imnet(name: str) -> None:
    assert "--data-set IMNET" in refusal(name, None)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient() -> np.ndarray:
    """[24, 40, 3], uint8, smooth, so that lossy formats keep it."""
    rows, columns = np.mgrid[0:24, 0:40]
    return np.stack([rows * 10, columns * 6, 255 - rows * 5 - columns * 3], axis=-1).astype(
        np.uint8
    )


def palette_with_alpha() -> bytes:
    image = Image.fromarray(gradient()).quantize(64)
    return encode(image, "PNG", transparency=bytes(range(0, 256, 4)))


def with_alpha(level: int) -> Image.Image:
    image = Image.fromarray(gradient())
    image.putalpha(level)
    return image


@pytest.mark.parametrize(
    ("name", "data", "tolerance"),
    [
        ("cmyk.jpg", encode(Image.fromarray(gradient()).convert("CMYK"), "JPEG", quality=95), 8),
        ("png_inside.jpg", encode(Image.fromarray(gradient()), "PNG"), 0),
        ("palette_with_alpha.png", palette_with_alpha(), 40),
        ("transparent.png", encode(with_alpha(0), "PNG"), 0),
        ("still.webp", encode(Image.fromarray(gradient()), "WEBP", lossless=True), 0),
    ],
)
def test_unusual_image_is_read_as_rgb(
    tmp_path: Path, name: str, data: bytes, tolerance: int
) -> None:
    (tmp_path / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - gradient()).max() <= tolerance


@pytest.mark.parametrize(
    ("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)]
)
def test_16_bits_keep_their_high_byte(tmp_path: Path, kind: str, dtype: type) -> None:
    levels = gradient()[..., 0]
    (tmp_path / "deep").write_bytes(encode(Image.fromarray(levels.astype(dtype) * 256 + 77), kind))
    image = read_image(tmp_path / "deep")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.stack([levels] * 3, axis=-1))


def levels_of(bits: int) -> np.ndarray:
    """[24, 40], from 0 to the white of so many bits."""
    return np.linspace(0, 2**bits - 1, 24 * 40).round().reshape(24, 40)


def rgb_tiff(values: np.ndarray) -> bytes:
    """A TIFF of 16 bits in each of three channels, which Pillow reads but does not write."""
    height, width = values.shape
    pixels = np.repeat(values.astype("<u2")[..., None], 3, axis=-1).tobytes()
    entries = [
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, 14), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(pixels))),
    ]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    start = struct.pack("<2sHI3H", b"II", 42, 14 + len(pixels), 16, 16, 16)
    return start + pixels + struct.pack("<H", len(entries)) + table + bytes(4)


def pgm(values: np.ndarray, white: int) -> bytes:
    height, width = values.shape
    return b"P5 %d %d %d\n" % (width, height, white) + values.astype(">u2").tobytes()


DEEP_IMAGES: dict[str, tuple[bytes, str]] = {
    f"{bits} bits in a {kind} of {dtype}": (
        encode(Image.fromarray(levels_of(bits).astype(dtype)), kind),
        f"its 16-bit values end at {2**bits - 1} of 65535",
    )
    for bits in (8, 10, 12)
    for kind, dtype in (("PNG", "uint16"), ("TIFF", "uint16"), ("TIFF", "int32"))
} | {
    "8 bits in 16, colour": (rgb_tiff(levels_of(8)), "end at 0 of 65535"),
    "12 bits in 16, colour": (rgb_tiff(levels_of(12)), "end at 3840 of 65535"),
    "12 bits in a PGM": (pgm(levels_of(12), 65535), "end at 4095 of 65535"),
    "negative numbers": (
        encode(Image.fromarray(levels_of(12).astype(np.int32) - 9), "TIFF"),
        "from -9 to 4086",
    ),
    "20 bits": (encode(Image.fromarray(levels_of(20).astype(np.int32)), "TIFF"), "to 1048575"),
    "from 0.0 to 1.0": (
        encode(Image.fromarray((levels_of(8) / 255).astype(np.float32)), "TIFF"),
        "floating point",
    ),
}


@pytest.mark.parametrize("name", DEEP_IMAGES)
def test_no_deep_image_turns_black_in_silence(tmp_path: Path, name: str) -> None:
    data, reason = DEEP_IMAGES[name]
    (tmp_path / "deep").write_bytes(data)
    with pytest.raises(ValueError, match=f"{reason}.*, so what is white cannot be known"):
        read_image(tmp_path / "deep")


@pytest.mark.parametrize(
    ("data", "bits"),
    [
        (encode(Image.fromarray(levels_of(16).astype(np.uint16)), "PNG"), 16),
        (rgb_tiff(levels_of(16)), 16),
        (pgm(levels_of(12), 4095), 12),
        (pgm(levels_of(16), 65535), 16),
        (encode(Image.fromarray(np.zeros((24, 40), np.uint16)), "PNG"), 0),
    ],
    ids=["PNG", "colour", "12-bit PGM", "16-bit PGM", "black"],
)
def test_deep_images_keep_their_range(tmp_path: Path, data: bytes, bits: int) -> None:
    (tmp_path / "deep").write_bytes(data)
    found = np.asarray(read_image(tmp_path / "deep")).astype(int)
    assert np.abs(found - (levels_of(bits) / 2 ** (bits - 8))[..., None]).max() <= 1


@pytest.mark.parametrize("kind", ["EPS", "GIF", "ICO", "PCX", "TGA", "DDS", "PDF"])
def test_formats_that_are_not_for_photographs_are_not_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", fail)
    (tmp_path / "photo.png").write_bytes(encode(Image.fromarray(gradient()), kind))
    with pytest.raises(UnidentifiedImageError):
        read_image(tmp_path / "photo.png")


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_each_extension_has_a_format_that_is_read(tmp_path: Path, extension: str) -> None:
    Image.fromarray(gradient()).convert("L").save(tmp_path / f"a{extension}")
    assert read_image(tmp_path / f"a{extension}").size == (40, 24)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "link to a FIFO"])
def test_what_is_no_regular_file_does_not_block(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "1.png"
    if kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "fifo" if kind == "link to a FIFO" else path)
    if kind == "link to a FIFO":
        path.symlink_to("fifo")
    with pytest.raises(OSError, match=r"FIFO, socket or device|No such device"):
        read_image(path)


def test_folders_that_lead_in_circles_are_visited_once(tmp_path: Path) -> None:
    write_files(tmp_path, "a/1.png", "a/deep/2.png", "b/3.png")
    for name in ("a/x", "a/y", "a/deep/z"):
        (tmp_path / name).symlink_to(".")
    (tmp_path / "a" / "deep" / "up").symlink_to("..")
    (tmp_path / "a" / "twin").symlink_to("deep")
    folder = ImageFolder(tmp_path)
    assert [folder.describe(i) for i in range(len(folder))] == [
        str(tmp_path / name) for name in ("a/1.png", "a/deep/2.png", "b/3.png")
    ]


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    write_files(tmp_path, "store/cats/deep/1.png", "store/2.png")
    root = tmp_path / "train"
    (root / "dog").mkdir(parents=True)
    # Two classes may be one folder: it is what the user says.
    for name, target in (
        ("cat", "cats"),
        ("lynx", "cats"),
        ("dog/more", "cats"),
        ("dog/2.png", "2.png"),
    ):
        (root / name).symlink_to(tmp_path / "store" / target)
    folder = ImageFolder(root)
    assert [folder.describe(i) for i in range(len(folder))] == [
        str(root / name)
        for name in ("cat/deep/1.png", "dog/2.png", "dog/more/deep/1.png", "lynx/deep/1.png")
    ]


@pytest.mark.parametrize("name", ["LISTOPS", "COCO", "SCENES"])
def test_sets_of_other_tasks_are_refused(tmp_path: Path, name: str) -> None:
    for path in (None, tmp_path):
        message = refusal(name, path)
        assert message.startswith(f"--data-set {name} has no images with one label each;")
        assert message.endswith(f"For {name} give its --task.")


def write_fashion(root: Path, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.RandomState(0).randint(0, 256, (5, 28, 28)).astype(np.uint8)
    labels = np.array([3, 9, 0, 3, 1], np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(root / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(root / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return images, labels


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_fashion_mnist(tmp_path: Path, suffix: str, split: str) -> None:
    images, labels = write_fashion(tmp_path, suffix)
    fashion = open_dataset("FMNIST", str(tmp_path), split, input_size=32)
    assert len(fashion) == 5
    assert len(fashion.class_names) == 10
    for index in range(5):
        image, label = fashion.read(index)
        assert (image.mode, label) == ("RGB", labels[index])
        assert np.array_equal(np.asarray(image)[..., 1], images[index])


def test_broken_idx_files_are_refused(tmp_path: Path) -> None:
    assert "no train-images-idx3-ubyte" in refusal("FMNIST", tmp_path)
    write_fashion(tmp_path, ".gz")
    images = tmp_path / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for broken in (b"", whole[:40], whole[:-9], gzip.compress(gzip.decompress(whole)[:-1])):
        images.write_bytes(broken)
        assert f"{images} is no whole idx file" in refusal("FMNIST", tmp_path)
    write_idx(images, np.zeros((5, 28, 28), np.uint8), header=(0, 0, 13, 3))
    assert "another format" in refusal("FMNIST", tmp_path)
    write_idx(images, np.zeros((4, 28, 28), np.uint8))
    assert "4 train images but 5 labels" in refusal("FMNIST", tmp_path)


def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (4, 3072)).astype(np.uint8)

    def publish(name: str, content: dict[str, object]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    train = publish("train", {"data": pixels, "fine_labels": [1, 0, 1, 1]})
    test = publish("test", {"data": pixels[:2], "fine_labels": [0, 1]})
    meta = publish("meta", {"fine_label_names": ["apple", "bear"]})
    monkeypatch.setattr(CIFAR100, "train_list", [train])
    monkeypatch.setattr(CIFAR100, "test_list", [test])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "filename": "meta", "md5": meta[1]})

    cifar = open_dataset("CIFAR", str(tmp_path), "train", input_size=32)
    assert len(open_dataset("CIFAR", str(tmp_path), "val", input_size=32)) == 2
    assert list(cifar.class_names) == ["apple", "bear"]
    image, label = cifar.read(2)
    assert label == 1
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1).ravel(), pixels[2])

    (folder / "train").write_bytes(b"another file")
    assert f"{folder} exists" in refusal("CIFAR", tmp_path)


def test_digits_are_split_once_for_all() -> None:
    train, val = (load_digits(split, size=8) for split in ("train", "val"))
    assert [len(train[1]), len(val[1])] == [1437, 360]
    # Recorded once: the split is part of every figure measured on it.
    assert val[1][:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    both = np.concatenate([train[0], val[0]]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) > 1790


def test_digits_keep_their_strokes_under_the_evaluation_crop() -> None:
    images, _ = load_digits("val", size=64)
    assert images.dtype == np.uint8
    assert images.max() > 240
    # The middle 224 of 256 is what evaluation sees.
    outside = images.astype(float).sum() - images[:, 4:60, 4:60].astype(float).sum()
    assert outside / images.astype(float).sum() < 0.01


def test_digits_folder_holds_the_same_images(tmp_path: Path) -> None:
    root = write_digits_folder(tmp_path / "new" / "digits", size=16)
    for split in ("train", "val"):
        images, labels = load_digits(split, size=16)
        folder = ImageFolder(root / split)
        assert len(folder) == len(labels)
        for index in range(0, len(folder), 50):
            image, label = folder.read(index)
            number = int(folder.path(index).stem)
            assert label == labels[number]
            assert np.array_equal(np.asarray(image)[..., 0], images[number])


def test_digits_folder_is_written_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: write_digits_folder(tmp_path / "digits", size=8), range(2)))
    assert os.listdir(tmp_path) == ["digits"]
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*/*/*.png")}
    assert len(times) == 1797
    write_digits_folder(tmp_path / "digits", size=8)
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_digits_folder_replaces_nothing(tmp_path: Path) -> None:
    write_files(tmp_path, "digits/train/0/mine.png")
    with pytest.raises(InputError, match=re.escape(f"digits to {tmp_path / 'digits'}")):
        write_digits_folder(tmp_path / "digits", size=8)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.png"]


def test_digits_folder_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(image: Image.Image, file: Path) -> None:
        if file.name == "0100.png":
            raise OSError(28, "No space left on device")
        file.touch()

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(InputError, match="No space left on device"):
        write_digits_folder(tmp_path / "digits", size=8)
    assert os.listdir(tmp_path) == []
