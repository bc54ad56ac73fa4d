"""Images and boxes in COCO's format: ``annotations/instances_NAME.json`` beside a folder NAME."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ecoformer.data.boxes import Annotation, Boxes, lay_out
from ecoformer.data.datasets import Fingerprint, read_image
from ecoformer.errors import InputError
from ecoformer.files import open_regular

# Boxes are rounded, so they may end this many pixels outside, and are cut off there.
_ROUNDING = 1.0
# Floats, which pycocotools keeps ids in, hold every whole number below.
_LARGEST = 2**53
_KINDS = {int: "a whole number", str: "printable text", list: "a list"}
# The published instances_train2017.json holds two boxes without height: id, image_id.
_PUBLISHED_WITHOUT_AREA = {(918, 200365), (2206849, 550395)}


class Coco:
    """One split of a data set in COCO's format, without its outlines.

    Classes are in the order of their ids. To train, images without a box are left out, and those of
    crowds do not count.

    Raises:
        InputError: an entry of the file is not as it should be, or an image is not there.
    """

    def __init__(self, file: Path, folder: Path, split: str) -> None:
        self.file = file
        self.folder = folder
        self.split = split
        content = _read_json(file)
        classes = _read_classes(file, content["categories"])
        images = _read_images(file, content["images"])
        annotations = _read_annotations(file, content["annotations"], images, classes)
        # Outlines take gigabytes.
        del content
        self.class_ids: Sequence[int] = list(classes)
        self.class_names: Sequence[str] = list(classes.values())
        # Arrays, as the names in ImageFolder: workers share them.
        self._ids = np.array(list(images), np.int64)
        self._sizes = np.array([size for _, size in images.values()], np.int64).reshape(-1, 2)
        self._names = np.array([name for name, _ in images.values()])
        places = {image_id: place for place, image_id in enumerate(images)}
        image = np.array([places[one.image_id] for one in annotations], np.int64)
        order = np.argsort(image, kind="stable")
        class_ids = np.array([one.class_id for one in annotations], np.int64)[order]
        self._labels = np.searchsorted(self.class_ids, class_ids)
        self._boxes = np.array([one.box for one in annotations], np.float64).reshape(-1, 4)[order]
        self._areas = np.array([one.area for one in annotations], np.float64)[order]
        self._is_crowd = np.array([one.is_crowd for one in annotations], bool)[order]
        # Those of image i are from ends[i] to ends[i + 1].
        self._ends = np.searchsorted(image[order], np.arange(len(images) + 1))
        kept = np.arange(len(images))
        if split == "train":
            kept = np.unique(image[order][~self._is_crowd])
        if not len(kept):
            raise InputError(f"{file} has no image{' with a box' * (split == 'train')}.")
        self._kept = kept
        self._require_files()

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, index: int) -> tuple[Image.Image, Boxes]:
        """Decode an image.

        Raises:
            Exception: what Pillow says of a file that is not a whole image.
            InputError: it has another size than the annotations say.
        """
        image = read_image(self.path(index))
        boxes = self.boxes(index)
        height, width = boxes.size
        if image.size != (width, height):
            raise InputError(
                f"it has {image.width} x {image.height} pixels, and {self.file} says "
                f"{width} x {height}"
            )
        return image, boxes

    def boxes(self, index: int) -> Boxes:
        """Give an image's boxes, cut off at its edges, without reading it."""
        image = self._kept[index]
        rows = slice(self._ends[image], self._ends[image + 1])
        height, width = self._sizes[image].tolist()
        corners = self._boxes[rows].copy()
        corners[:, 2:] += corners[:, :2]
        corners = corners.clip(0, [width, height, width, height]).astype(np.float32)
        return Boxes(
            corners,
            self._labels[rows],
            self._is_crowd[rows],
            image_id=int(self._ids[image]),
            size=(height, width),
        )

    def path(self, index: int) -> Path:
        return self.folder / os.fsdecode(self._names[self._kept[index]])

    def ground_truth(self) -> dict[str, Any]:
        """Lay out boxes and areas as they stand in the file, by which published AP is measured."""
        image_ids = np.repeat(self._ids, np.diff(self._ends)).tolist()
        class_ids = np.array(self.class_ids)[self._labels].tolist()
        rows = (self._boxes.tolist(), self._areas.tolist(), self._is_crowd.tolist())
        sizes = ((height, width) for height, width in self._sizes.tolist())
        return lay_out(
            dict(zip(self._ids.tolist(), sizes, strict=True)),
            map(Annotation, image_ids, class_ids, *rows),
            dict(zip(self.class_ids, self.class_names, strict=True)),
        )

    def describe(self, index: int) -> str:
        return str(self.path(index))

    def fingerprint(self) -> Fingerprint:
        digest = hashlib.blake2b(digest_size=16)
        for class_id, name in zip(self.class_ids, self.class_names, strict=True):
            digest.update(f"{class_id} {name}\0".encode())
        for array in (self._names, self._ids, self._kept, self._ends, self._labels, self._boxes):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        digest.update(self._is_crowd.view(np.uint8).data)
        return {
            "num_classes": len(self.class_names),
            "num_images": len(self),
            "digest": digest.hexdigest(),
        }

    def _require_files(self) -> None:
        try:
            listed = set(os.listdir(os.fsencode(self.folder)))
        except OSError as error:
            raise InputError(
                f"cannot read {self.folder} ({error.strerror}); expected the images of {self.file} "
                "there."
            ) from error
        names = self._names[self._kept].tolist()
        missing = [
            name
            for name in names
            # In a folder below, perhaps.
            if name not in listed
            and not os.path.isfile(os.path.join(os.fsencode(self.folder), name))
        ]
        if missing:
            number = int(self._ids[self._kept[names.index(missing[0])]])
            raise InputError(
                f"{self.file}: image {number}, and {len(missing) - 1} others, are not there; "
                f"expected {self.folder / os.fsdecode(missing[0])}."
            )


def open_coco(path: str, split: str) -> Coco:
    """Open one split, ``"train"`` or ``"val"``, of a folder laid out as COCO's.

    Raises:
        InputError: it is not there, or not as it should be.
    """
    folder = Path(path, "annotations")
    files = sorted(folder.glob(f"instances_{split}*.json"))
    if len(files) != 1:
        found = f"{len(files)} files" if files else "no file"
        raise InputError(
            f"{folder} holds {found} instances_{split}*.json; expected one, such as "
            f"instances_{split}2017.json, with its images in {split}2017/ beside annotations/."
        )
    name = files[0].stem.removeprefix("instances_")
    return Coco(files[0], Path(path, name), split)


def _read_json(file: Path) -> dict[str, list[Any]]:
    try:
        with open_regular(file) as opened:
            content = json.load(opened)
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no whole JSON file ({error}); get it again.") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError(
                f"{file} has no list {name!r}; expected COCO's format: images, annotations and "
                "categories."
            )
    return content


def _read_classes(file: Path, entries: list[Any]) -> dict[int, str]:
    """Map ids to names, by rising id."""
    found: dict[int, str] = {}
    for number, entry in enumerate(entries):
        where = f"{file}: category {number} of 'categories'"
        class_id = _take(entry, "id", int, where)
        if class_id in found:
            raise InputError(f"{where} has the id {class_id} of another; give it one of its own.")
        found[class_id] = _take(entry, "name", str, where)
    if not found:
        raise InputError(f"{file} has no categories; expected one a class.")
    return dict(sorted(found.items()))


def _read_images(file: Path, entries: list[Any]) -> dict[int, tuple[bytes, tuple[int, int]]]:
    """Map ids to file names, and height and width."""
    found: dict[int, tuple[bytes, tuple[int, int]]] = {}
    for number, entry in enumerate(entries):
        where = f"{file}: image {number} of 'images'"
        image_id = _take(entry, "id", int, where)
        if image_id in found:
            raise InputError(f"{where} has the id {image_id} of another; give it one of its own.")
        height, width = (_take(entry, name, int, where) for name in ("height", "width"))
        if not height or not width:
            raise InputError(f"{where} has {width} x {height} pixels; expected its size.")
        found[image_id] = _take(entry, "file_name", str, where).encode(), (height, width)
    return found


def _read_annotations(
    file: Path,
    entries: list[Any],
    images: Mapping[int, tuple[bytes, tuple[int, int]]],
    classes: Mapping[int, str],
) -> list[Annotation]:
    found = []
    for number, entry in enumerate(entries):
        number = _take(entry, "id", int, f"{file}: annotation {number} of 'annotations'")
        where = f"{file}: annotation {number}"
        image_id = _take(entry, "image_id", int, where)
        class_id = _take(entry, "category_id", int, where)
        if image_id not in images:
            raise InputError(
                f"{where} is of image {image_id}, which 'images' does not hold; add the image or "
                "delete the annotation."
            )
        if class_id not in classes:
            raise InputError(
                f"{where} has the class id {class_id}, which 'categories' does not hold; add the "
                "class or correct the id."
            )
        box = _take(entry, "bbox", list, where)
        if (number, image_id) in _PUBLISHED_WITHOUT_AREA and box[3:] == [0.0]:
            continue
        _check_box(box, images[image_id][1], f"{where} of image {image_id}")
        area = entry.get("area", box[2] * box[3])
        if not _is_number(area) or area < 0:
            raise InputError(f"{where} has the area {area!r}; expected a number of pixels.")
        is_crowd = entry.get("iscrowd", 0)
        if is_crowd not in (0, 1):
            raise InputError(f"{where} has {is_crowd!r} as 'iscrowd'; expected 0 or 1.")
        found.append(Annotation(image_id, class_id, box, area, bool(is_crowd)))
    return found


def _check_box(box: list[Any], size: tuple[int, int], where: str) -> None:
    expected = "expected [left, top, width, height] in pixels"
    if len(box) != 4 or not all(map(_is_number, box)):
        raise InputError(f"{where} has the box {box}; {expected}.")
    left, top, width, height = box
    if width <= 0 or height <= 0:
        raise InputError(f"{where} has the box {box}, of no area; {expected}.")
    for start, end, whole in ((left, left + width, size[1]), (top, top + height, size[0])):
        is_outside = start < -_ROUNDING or end > whole + _ROUNDING
        if is_outside or min(end, whole) <= max(start, 0):
            raise InputError(
                f"{where} has the box {box}, outside of its {size[1]} x {size[0]} pixels; "
                f"{expected}."
            )


def _is_number(value: object) -> bool:
    # Not NaN, and nothing that overflows a float.
    return type(value) in (int, float) and abs(value) < _LARGEST  # type: ignore[arg-type]


def _take(entry: Any, name: str, kind: type, where: str) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    is_right = isinstance(value, kind)
    if kind is int:
        is_right = type(value) is int and 0 <= value < _LARGEST
    elif kind is str:
        is_right = isinstance(value, str) and value.isprintable()
    if not is_right:
        found = "nothing" if value is None else repr(value)
        raise InputError(f"{where} has {found} as {name!r}; expected {_KINDS[kind]}.")
    return value
