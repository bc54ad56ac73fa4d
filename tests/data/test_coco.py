"""COCO's format: boxes as the file says, and one line with file and entry where it cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ecoformer.data.coco import Coco, open_coco
from ecoformer.errors import InputError
from tests.data.dense_files import SIZES, coco_content, write_coco


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"))


def read_by_id(coco: Coco) -> dict[int, Any]:
    return {boxes.image_id: boxes for _, boxes in map(coco.read, range(len(coco)))}


def test_boxes_are_those_of_the_file(folder: Path) -> None:
    coco = open_coco(str(folder), "val")
    assert coco.class_ids == [1, 17, 90]
    assert coco.class_names == ["person", "cat", "brush"]
    found = read_by_id(coco)
    assert {image_id: boxes.size for image_id, boxes in found.items()} == SIZES
    # In the order of the file; cut off where rounding put them outside.
    np.testing.assert_array_equal(found[4].boxes, [[2.5, 3.25, 12.5, 23.75], [0, 0, 30, 50]])
    np.testing.assert_array_equal(found[9].boxes, [[50, 0, 60, 40], [0, 5, 19.5, 15]])
    assert found[4].labels.tolist() == [2, 0] and found[9].labels.tolist() == [0, 1]
    assert found[7].is_crowd.tolist() == [True] and not found[4].is_crowd.any()
    assert found[5].boxes.shape == (0, 4) and found[5].labels.dtype == np.int64
    assert found[4].boxes.dtype == np.float32


def test_images_are_those_of_the_file(folder: Path) -> None:
    coco = open_coco(str(folder), "val")
    for index in range(len(coco)):
        image, boxes = coco.read(index)
        file = folder / "val2017" / f"{boxes.image_id:04}.png"
        assert coco.describe(index) == str(file)
        with Image.open(file) as expected:
            assert image.tobytes() == expected.tobytes()


def test_training_leaves_out_images_without_a_box(folder: Path) -> None:
    coco = open_coco(str(folder), "train")
    assert {boxes.image_id for boxes in map(coco.boxes, range(len(coco)))} == {4, 9}


def test_the_ground_truth_is_the_file_itself(folder: Path) -> None:
    """As pycocotools reads it, but for outlines and the numbers of annotations."""
    truth = open_coco(str(folder), "val").ground_truth()
    published = COCO(str(folder / "annotations" / "instances_val2017.json"))
    mine = COCO()
    mine.dataset = truth
    mine.createIndex()
    assert sorted(mine.anns) == [1, 2, 3, 4, 5]
    assert mine.getCatIds() == sorted(published.getCatIds())
    assert sorted(mine.getImgIds()) == sorted(published.getImgIds())
    for image_id in SIZES:
        left, right = (
            [
                {key: one[key] for key in ("image_id", "category_id", "bbox", "area", "iscrowd")}
                for one in coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
            ]
            for coco in (mine, published)
        )
        assert left == right


def test_area_and_crowd_may_be_left_out(tmp_path: Path) -> None:
    content = coco_content()
    for one in content["annotations"]:
        del one["area"], one["iscrowd"], one["segmentation"]
    truth = open_coco(str(write_coco(tmp_path, content)), "val").ground_truth()
    assert [one["area"] for one in truth["annotations"] if one["image_id"] == 4] == [205, 1500]
    assert not any(one["iscrowd"] for one in truth["annotations"])


def test_the_published_boxes_without_height_are_left_out(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["id"] = 200365
    content["annotations"] += [
        {**content["annotations"][0], "id": 918, "image_id": 200365, "bbox": [1.5, 2, 1.03, 0.0]}
    ]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 9]
    coco = open_coco(str(write_coco(tmp_path, content)), "train")
    assert [coco.boxes(index).image_id for index in range(len(coco))] == [4]


def test_fingerprints_tell_sets_apart(folder: Path, tmp_path: Path) -> None:
    first = open_coco(str(folder), "val").fingerprint()
    assert first == open_coco(str(folder), "val").fingerprint()
    assert (first["num_classes"], first["num_images"]) == (3, 4)
    for number, (entry, name, value) in enumerate(
        (
            ("annotations", "bbox", [2, 3, 10, 20]),
            ("annotations", "category_id", 17),
            ("annotations", "iscrowd", 1),
            ("categories", "name", "dog"),
        )
    ):
        content = coco_content()
        content[entry][0][name] = value
        root = write_coco(tmp_path / str(number), content)
        assert open_coco(str(root), "val").fingerprint() != first


def refusal(root: Path, split: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        open_coco(str(root), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(kind: str, number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(content: dict[str, Any]) -> None:
        content[kind][number].update(values)

    return spoil


def drop(kind: str, number: int, name: str) -> Callable[[dict[str, Any]], None]:
    def spoil(content: dict[str, Any]) -> None:
        del content[kind][number][name]

    return spoil


def box(*values: Any) -> Callable[[dict[str, Any]], None]:
    """In annotation 1, of image 4, which has 30 x 50 pixels."""
    return change("annotations", 2, bbox=list(values))


BAD_ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no image": (
        change("annotations", 2, image_id=3),
        "annotation 1 is of image 3, which 'images' does not hold; add the image or delete",
    ),
    "unknown class": (
        change("annotations", 2, category_id=2),
        "annotation 1 has the class id 2, which 'categories' does not hold",
    ),
    "no width": (box(1, 2, 0, 4), "annotation 1 of image 4 has the box [1, 2, 0, 4], of no area"),
    "no height": (box(1, 2, 3, 0.0), "annotation 1 of image 4 has the box [1, 2, 3, 0.0], of no"),
    "negative": (box(9, 9, -3, 4), "annotation 1 of image 4 has the box [9, 9, -3, 4], of no area"),
    "too far right": (
        box(20, 9, 12, 4),
        "annotation 1 of image 4 has the box [20, 9, 12, 4], outside of its 30 x 50 pixels; "
        "expected [left, top, width, height] in pixels",
    ),
    "too far down": (box(2, 40, 5, 12), "box [2, 40, 5, 12], outside of its 30 x 50 pixels"),
    "too far left": (box(-2, 9, 12, 4), "box [-2, 9, 12, 4], outside of"),
    "too far up": (box(2, -1.5, 12, 4), "box [2, -1.5, 12, 4], outside of"),
    "just outside": (box(30, 9, 0.5, 4), "box [30, 9, 0.5, 4], outside of"),
    "NaN": (box(1, float("nan"), 2, 2), "annotation 1 of image 4 has the box [1, nan, 2, 2]"),
    "infinite": (box(1, 1, float("inf"), 2), "annotation 1 of image 4 has the box [1, 1, inf, 2]"),
    "huge": (box(1, 1, 10**400, 2), "annotation 1 of image 4 has the box [1, 1, 1000"),
    "three numbers": (box(1, 2, 3), "annotation 1 of image 4 has the box [1, 2, 3]; expected"),
    "text": (box(1, 2, 3, "4"), "annotation 1 of image 4 has the box [1, 2, 3, '4']; expected"),
    "no box": (drop("annotations", 2, "bbox"), "annotation 1 has nothing as 'bbox'; expected a l"),
    "box as text": (change("annotations", 2, bbox="1"), "annotation 1 has '1' as 'bbox'"),
    "no id": (
        drop("annotations", 2, "id"),
        "annotation 2 of 'annotations' has nothing as 'id'; expected a whole number",
    ),
    "true": (change("annotations", 2, image_id=True), "annotation 1 has True as 'image_id'"),
    "huge id": (change("images", 1, id=2**53), f"image 1 of 'images' has {2**53} as 'id'"),
    "area": (change("annotations", 2, area=-1), "annotation 1 has the area -1"),
    "crowd": (change("annotations", 2, iscrowd=2), "annotation 1 has 2 as 'iscrowd'"),
    "two images": (change("images", 1, id=9), "image 1 of 'images' has the id 9 of another"),
    "two classes": (change("categories", 1, id=17), "category 1 of 'categories' has the id 17 of"),
    "no size": (change("images", 1, width=0), "image 1 of 'images' has 0 x 50 pixels"),
    "no name": (drop("images", 1, "file_name"), "image 1 of 'images' has nothing as 'file_name'"),
    "a name for terminals": (
        change("images", 1, file_name="\x1b[2J"),
        r"image 1 of 'images' has '\x1b[2J' as 'file_name'; expected printable text",
    ),
    "a name that is none": (change("images", 1, file_name="\ud800"), r"has '\ud800' as 'file_nam"),
    "no file": (
        change("images", 1, file_name="gone.png"),
        "image 4, and 0 others, are not there; expected ",
    ),
    "entry": (lambda content: content["images"].append(3), "image 4 of 'images' has nothing as"),
    "no categories": (lambda content: content["categories"].clear(), "has no categories"),
    "no annotations": (lambda content: content["annotations"].clear(), "has no image with a box"),
    "no list": (lambda content: content.pop("images"), "has no list 'images'; expected COCO's f"),
}


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_a_bad_entry_is_one_line_with_the_file(tmp_path: Path, kind: str) -> None:
    spoil, expected = BAD_ENTRIES[kind]
    content = coco_content()
    spoil(content)
    message = refusal(write_coco(tmp_path, content))
    assert message.startswith(str(tmp_path / "annotations" / "instances_train2017.json"))
    assert expected in message


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "<html>", '{"images": 3}', "[" * 100_000, "\ufeff{}", b"\xff\xfe"]
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str | bytes) -> None:
    file = write_coco(tmp_path) / "annotations" / "instances_train2017.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(tmp_path)
    assert message.startswith(str(file))
    assert "is no whole JSON file" in message or "has no list 'images'" in message


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    file = write_coco(tmp_path) / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(coco_content())[:-30])
    assert f"{file} is no whole JSON file" in refusal(tmp_path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert "holds no file instances_train*.json; expected one, such as" in refusal(tmp_path)
    write_coco(tmp_path)
    extra = tmp_path / "annotations" / "instances_train2014.json"
    extra.write_text("{}")
    assert "holds 2 files instances_train*.json" in refusal(tmp_path)
    extra.unlink()
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    assert f"cannot read {tmp_path / 'train2017'} (No such file" in refusal(tmp_path)
    assert len(open_coco(str(tmp_path), "val")) == 4


def test_another_layout_needs_no_year(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").rename(
        tmp_path / "annotations" / "instances_val.json"
    )
    # Images may lie in folders of their own.
    (tmp_path / "val2017").rename(tmp_path / "val")
    (tmp_path / "val" / "deep").mkdir()
    content = coco_content()
    content["images"][0]["file_name"] = "deep/0009.png"
    (tmp_path / "val" / "0009.png").rename(tmp_path / "val" / "deep" / "0009.png")
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    coco = open_coco(str(tmp_path), "val")
    assert coco.read(0)[1].image_id == 9


def test_an_image_of_another_size_is_bad(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    Image.new("RGB", (31, 50)).save(root / "val2017" / "0004.png")
    coco = open_coco(str(root), "val")
    file = root / "annotations" / "instances_val2017.json"
    expected = re.escape(f"it has 31 x 50 pixels, and {file} says 30 x 50")
    with pytest.raises(InputError, match=expected):
        coco.read(1)
