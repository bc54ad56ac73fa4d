"""Folders of label maps: labels as ADE20K counts them, and one line where they cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecoformer.data.label_maps import IGNORED, open_label_map_folder
from ecoformer.errors import InputError
from tests.data.dense_files import write_label_maps


def refusal(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_label_map_folder(str(root), "train").read(0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_zero_is_ignored_and_others_count_from_zero(tmp_path: Path, split: str) -> None:
    maps = open_label_map_folder(str(write_label_maps(tmp_path)), split)
    assert len(maps) == 3 and len(maps.class_names) == 150
    for index in range(3):
        image, labels = maps.read(index)
        # Images of these files are as bright as their map.
        values = np.asarray(image)[..., 0].astype(int)
        assert labels.shape == values.shape == (40 + index, 50)
        np.testing.assert_array_equal(labels, np.where(values == 0, IGNORED, values - 1))
    name = {"train": "training", "val": "validation"}[split]
    assert maps.describe(2) == str(tmp_path / "images" / name / "002.png")


def test_a_map_with_a_palette_is_read_by_number(tmp_path: Path) -> None:
    write_label_maps(tmp_path)
    file = tmp_path / "annotations" / "training" / "000.png"
    expected = np.asarray(Image.open(file))
    image = Image.fromarray(expected)
    image.putpalette(np.random.RandomState(0).bytes(768))
    image.save(file)
    with Image.open(file) as saved:
        assert saved.mode == "P"
    _, labels = open_label_map_folder(str(tmp_path), "train").read(0)
    np.testing.assert_array_equal(labels, expected - np.uint8(1))


def test_images_may_be_photographs(tmp_path: Path) -> None:
    write_label_maps(tmp_path)
    folder = tmp_path / "images" / "training"
    for file in sorted(folder.iterdir()):
        with Image.open(file) as image:
            image.save(file.with_suffix(".jpg"))
        file.unlink()
    (folder / ".hidden.jpg").touch()
    first = tmp_path / "annotations" / "training" / "000.png"
    first.rename(first.with_suffix(".PNG"))
    maps = open_label_map_folder(str(tmp_path), "train")
    assert maps.describe(0).endswith("000.jpg") and maps.read(0)[0].mode == "RGB"


def test_classes_are_named_by_a_file(tmp_path: Path) -> None:
    write_label_maps(tmp_path, num_classes=2)
    before = open_label_map_folder(str(tmp_path), "train").fingerprint()
    (tmp_path / "classes.txt").write_text("road\nsky\n\n")
    maps = open_label_map_folder(str(tmp_path), "train")
    assert maps.class_names == ["road", "sky"]
    assert maps.fingerprint() != before and maps.fingerprint()["num_classes"] == 2
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n"
        "1\t0.1576\t11664\t1172\twall\n"
        "2\t0.1072\t6046\t612\tbuilding, edifice\n"
    )
    names = open_label_map_folder(str(tmp_path), "train").class_names
    assert names == ["wall", "building, edifice"]


@pytest.mark.parametrize("text", ["", "\n".join(map(str, range(255))), b"\xff"])
def test_a_file_of_no_or_too_many_names_is_refused(tmp_path: Path, text: str | bytes) -> None:
    file = write_label_maps(tmp_path) / "classes.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(file) in refusal(tmp_path)


def test_a_map_of_another_size_is_refused(tmp_path: Path) -> None:
    write_label_maps(tmp_path)
    file = tmp_path / "annotations" / "training" / "000.png"
    Image.new("L", (50, 41)).save(file)
    assert refusal(tmp_path) == f"its map {file} has 50 x 41 pixels, not 50 x 40"


def test_an_unknown_class_id_is_refused(tmp_path: Path) -> None:
    write_label_maps(tmp_path)
    file = tmp_path / "annotations" / "training" / "000.png"
    Image.new("L", (50, 40), 151).save(file)
    assert refusal(tmp_path) == f"its map {file} holds class id 151, of 150 classes"


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1", "LA"])
def test_a_map_of_another_kind_is_refused(tmp_path: Path, mode: str) -> None:
    write_label_maps(tmp_path)
    file = tmp_path / "annotations" / "training" / "000.png"
    Image.new(mode, (50, 40)).save(file)
    assert f"its map {file} has mode " in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 20, 500])
def test_a_broken_map_is_refused(tmp_path: Path, size: int) -> None:
    write_label_maps(tmp_path)
    file = tmp_path / "annotations" / "training" / "000.png"
    file.write_bytes(file.read_bytes()[:size])
    assert refusal(tmp_path) == f"its map {file} is no whole PNG file"


def test_files_without_their_partner_are_refused(tmp_path: Path) -> None:
    images, maps = (tmp_path / kind / "training" for kind in ("images", "annotations"))
    assert f"cannot read {images} (No such file" in refusal(tmp_path)
    write_label_maps(tmp_path)
    (maps / "001.png").unlink()
    message = refusal(tmp_path)
    assert message.startswith(f"{images / '001.png'}, and 0 others, have no partner; expected a")
    assert f"{maps} for each image in {images}" in message
    (images / "001.png").unlink()
    (images / "002.png").unlink()
    assert refusal(tmp_path).startswith(f"{maps / '002.png'}, and 0 others, have no partner")
    (images / "002.jpg").touch()
    (images / "002.webp").touch()
    assert (
        refusal(tmp_path) == f"{images / '002.webp'} has the name of 002.jpg there; expected one."
    )
    for folder in (images, maps):
        for file in folder.iterdir():
            file.unlink()
    assert f"{images} holds no image" in refusal(tmp_path)
