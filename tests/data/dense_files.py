"""Small data sets for detection and segmentation, laid out as COCO's and ADE20K's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Height and width, by the image's id.
SIZES = {9: (40, 60), 4: (50, 30), 7: (33, 47), 5: (64, 64)}
# id, image, category, box, crowd; image 5 has none, 7 a crowd alone, and they are in no order.
ANNOTATIONS = (
    (0, 4, 90, [2.5, 3.25, 10.0, 20.5], 0),
    (3, 9, 1, [50.0, 0.0, 10.6, 40.0], 0),
    (1, 4, 1, [0.0, 0.0, 30.0, 50.0], 0),
    (8, 7, 1, [1.0, 1.0, 30.0, 30.0], 1),
    (5, 9, 17, [-0.5, 5.0, 20.0, 10.0], 0),
)


def coco_content() -> dict[str, Any]:
    """An annotation file that has nothing wrong."""
    return {
        "images": [
            {"id": i, "file_name": f"{i:04}.png", "height": height, "width": width}
            for i, (height, width) in SIZES.items()
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                # That of an outline.
                "area": 0.75 * box[2] * box[3],
                "iscrowd": crowd,
                "segmentation": [],
            }
            for number, image, category, box, crowd in ANNOTATIONS
        ],
        # Ids with gaps, and in no order, as in the published files.
        "categories": [
            {"id": 17, "name": "cat"},
            {"id": 1, "name": "person"},
            {"id": 90, "name": "brush"},
        ],
    }


def write_coco(root: Path, content: dict[str, Any] | None = None) -> Path:
    """Both splits with equal content, of images of noise."""
    for name in ("train2017", "val2017"):
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / name).mkdir(exist_ok=True)
        file = root / "annotations" / f"instances_{name}.json"
        file.write_text(json.dumps(content or coco_content()))
        for image_id, (height, width) in SIZES.items():
            pixels = np.random.RandomState(image_id).randint(0, 256, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{image_id:04}.png")
    return root


def write_label_maps(root: Path, num_images: int = 3, num_classes: int = 150) -> Path:
    """Both splits: maps of noise, and images that are as bright as their map says."""
    for split in ("training", "validation"):
        for number in range(num_images):
            draw = np.random.RandomState(number)
            labels = draw.randint(num_classes + 1, size=(40 + number, 50)).astype(np.uint8)
            for kind in ("images", "annotations"):
                file = root / kind / split / f"{number:03}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(labels)
                (image.convert("RGB") if kind == "images" else image).save(file)
    return root
