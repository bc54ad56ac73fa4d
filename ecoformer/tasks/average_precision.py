"""AP of boxes over all ranks, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ecoformer.errors import InputError, NonFiniteError
from ecoformer.ranks import broadcast_object, gather_objects, run_on_main

# As pycocotools orders them.
_NAMES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)


class AveragePrecision:
    """Collects the detections of this rank's images, and measures those of all ranks.

    Detections are evaluated in the order of the images' ids, and in one image as they were given,
    so that the number of ranks changes nothing.

    Args:
        ground_truth: in COCO's format; its annotations are numbered from 1.
        class_ids: the ids of its categories, in the order of labels.
    """

    def __init__(self, ground_truth: Mapping[str, Any], class_ids: Sequence[int]) -> None:
        self.ground_truth = ground_truth
        self.class_ids = np.asarray(class_ids)
        # By image: one row a detection, [n, 7]: image id, left, top, width, height, score, class.
        self._rows: dict[int, np.ndarray] = {}

    def add(self, image_id: int, boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Keep what was found in an image, each image once.

        Args:
            boxes: [n, 4], float: left, top, right, bottom, pixels of the original image.
            scores: [n], float.
            labels: [n], int64.
        """
        assert image_id not in self._rows, f"image {image_id} was evaluated twice"
        corners = boxes.double().cpu().numpy()
        sides = corners[:, 2:] - corners[:, :2]
        # pycocotools leaves out what has a negative area.
        assert not (np.isfinite(sides) & (sides < 0)).any(), "a box is inside out"
        self._rows[image_id] = np.column_stack(
            [
                np.full(len(corners), image_id),
                corners[:, :2],
                sides,
                scores.double().cpu().numpy(),
                self.class_ids[labels.cpu().numpy()],
            ]
        )

    def finish(self) -> dict[str, float]:
        """Measure what all ranks have, in percent; each must ask, and gets the same.

        Values that nothing in the ground truth tells, such as AP of large boxes where there are
        none, are left out.

        Raises:
            InputError: no rank had an image, or none has a box.
            NonFiniteError: a box or a score is not finite.
        """
        parts = gather_objects(self._rows)
        rows: dict[int, np.ndarray] = {}
        for part in parts:
            assert not rows.keys() & part.keys(), "two ranks evaluated one image"
            rows |= part
        if not rows:
            raise InputError("there is no image to evaluate on.")
        detections = np.concatenate([rows[image_id] for image_id in sorted(rows)])
        if not np.isfinite(detections).all():
            raise NonFiniteError(
                "a detected box or its score is not finite; check the model's weights, or evaluate "
                "with --amp-dtype none."
            )
        values: dict[str, float] = {}
        run_on_main(lambda: values.update(evaluate(self.ground_truth, detections, sorted(rows))))
        values = broadcast_object(values)
        if not values:
            raise InputError("the evaluated images have no box to find.")
        return values


def evaluate(
    ground_truth: Mapping[str, Any], detections: np.ndarray, image_ids: Sequence[int]
) -> dict[str, float]:
    """Evaluate rows [n, 7], as ``AveragePrecision`` keeps them, on these images alone; percent."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # It prints what it does.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        # It writes into annotations.
        truth.dataset = {
            **ground_truth,
            "annotations": [{**one} for one in ground_truth["annotations"]],
        }
        truth.createIndex()
        found = truth.loadRes(detections) if len(detections) else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: 100 * value
        for name, value in zip(_NAMES, evaluation.stats.tolist(), strict=True)
        # -1 where there is nothing to find.
        if value >= 0
    }
