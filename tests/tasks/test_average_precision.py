"""AP: published and hand-checked cases, another evaluator, and equal on any number of ranks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from ecoformer.data.boxes import Annotation, lay_out
from ecoformer.data.scenes import open_scenes
from ecoformer.engine.launch import process_group
from ecoformer.errors import InputError, NonFiniteError
from ecoformer.ranks import rank, world_size
from ecoformer.tasks.average_precision import AveragePrecision
from tests.engine.ranks import run_ranks

# Per image: one row a box, left, top, right, bottom, label, and 1 for a crowd.
Truth = dict[int, list[list[float]]]
# The same with the score in the crowd's place.
Found = dict[int, list[list[float]]]

# COCO's annotations of four images of val2014, and what its example of results says of them
# (instances_val2014_fakebbox100_results.json of cocodataset/cocoapi), classes numbered anew.
EXAMPLE_TRUTH: Truth = {
    42: [[214.15, 41.29, 562.41, 285.07, 4, 0]],
    73: [[13.00, 22.75, 548.98, 632.42, 2, 0], [1.66, 3.32, 270.26, 275.23, 2, 0]],
    74: [
        [61.87, 276.25, 358.29, 379.43, 4, 0],
        [2.75, 3.66, 162.15, 316.06, 1, 0],
        [295.55, 93.96, 313.97, 152.79, 0, 0],
        [326.94, 97.05, 340.49, 122.98, 0, 0],
        [356.62, 95.47, 372.33, 147.55, 0, 0],
        [462.08, 105.09, 493.74, 146.99, 0, 0],
        [277.11, 103.84, 292.44, 150.72, 0, 0],
    ],
    133: [[13.99, 2.87, 640.00, 421.52, 5, 0]],
}
EXAMPLE_FOUND: Found = {
    42: [[258.15, 41.29, 606.41, 285.07, 4, 0.236]],
    73: [[61.00, 22.75, 565.00, 632.42, 3, 0.318], [12.66, 3.32, 281.26, 275.23, 2, 0.726]],
    74: [
        [87.87, 276.25, 384.29, 379.43, 4, 0.546],
        [0.00, 3.66, 142.15, 316.06, 1, 0.3],
        [296.55, 93.96, 314.97, 152.79, 0, 0.407],
        [328.94, 97.05, 342.49, 122.98, 0, 0.611],
        [356.62, 95.47, 372.33, 147.55, 0, 0.335],
        [464.08, 105.09, 495.74, 146.99, 0, 0.805],
        [276.11, 103.84, 291.44, 150.72, 0, 0.953],
    ],
    133: [[0.00, 2.87, 601.00, 421.52, 5, 0.699]],
}
# What pycocotools printed for these.
EXAMPLE_VALUES = {
    "AP": 70.6,
    "AP50": 90.1,
    "AP75": 84.6,
    "AR_1": 59.2,
    "AR_10": 71.6,
    "AR_100": 71.6,
}


def lay_out_truth(truth: Truth, num_classes: int = 6) -> tuple[dict[str, Any], list[int]]:
    """Ground truth whose class ids are 10, 20 ..., and these."""
    ids = [10 * (label + 1) for label in range(num_classes)]
    annotations = [
        Annotation(
            image_id,
            ids[int(label)],
            (left, top, right - left, bottom - top),
            (right - left) * (bottom - top),
            bool(is_crowd),
        )
        for image_id, rows in truth.items()
        for left, top, right, bottom, label, is_crowd in rows
    ]
    sizes = dict.fromkeys(truth, (700, 700))
    return lay_out(sizes, annotations, {i: str(i) for i in ids}), ids


def start(truth: Truth) -> AveragePrecision:
    return AveragePrecision(*lay_out_truth(truth))


def add(meter: AveragePrecision, image_id: int, rows: list[list[float]]) -> None:
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    meter.add(image_id, table[:, :4], table[:, 5], table[:, 4].long())


def measure(truth: Truth, found: Found) -> dict[str, float]:
    meter = start(truth)
    for image_id in truth:
        add(meter, image_id, found.get(image_id, []))
    return meter.finish()


def test_the_example_of_pycocotools() -> None:
    values = measure(EXAMPLE_TRUTH, EXAMPLE_FOUND)
    for name, expected in EXAMPLE_VALUES.items():
        assert values[name] == pytest.approx(expected, abs=0.06)


def test_checked_by_hand() -> None:
    """Two boxes, three guesses by falling score: a hit, a miss, a hit that overlaps by 0.6."""
    truth: Truth = {1: [[0, 0, 100, 100, 0, 0]], 2: [[0, 0, 100, 100, 0, 0]]}
    found: Found = {
        1: [[0, 0, 100, 100, 0, 0.9]],
        2: [[300, 300, 400, 400, 0, 0.8], [0, 0, 100, 60, 0, 0.7]],
    }
    values = measure(truth, found)
    # Precision is 1 up to a recall of 1/2, which 51 of 101 recalls are below, then 2/3 for the
    # overlaps that count 0.6 as a hit: 0.5, 0.55 and 0.6 of ten.
    easy, hard = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert values["AP50"] == pytest.approx(100 * easy)
    assert values["AP75"] == pytest.approx(100 * hard)
    assert values["AP"] == pytest.approx(100 * (3 * easy + 7 * hard) / 10)
    assert values["AR_1"] == pytest.approx(100 * 1 / 2)
    assert values["AR_10"] == pytest.approx(100 * (3 * 1 + 7 * 1 / 2) / 10)
    # Both have 100^2 pixels, which is large.
    assert values["AP_large"] == values["AP"]
    assert "AP_small" not in values and "AR_medium" not in values


def test_a_crowd_is_neither_found_nor_missed() -> None:
    alone: Truth = {1: [[0, 0, 50, 50, 0, 0]]}
    crowded: Truth = {1: [*alone[1], [200, 200, 600, 600, 0, 1]]}
    hit = [0, 0, 50, 50, 0, 0.5]
    # Better scores, all inside of the crowd, where they are no miss, and none of another class.
    inside = [[210 + 50 * n, 210, 250 + 50 * n, 260, 0, 0.9] for n in range(5)]
    assert measure(crowded, {1: [*inside, hit]})["AP"] == pytest.approx(100)
    assert measure(alone, {1: [*inside, hit]})["AP"] == pytest.approx(100 / 6)
    # A box that nobody found would halve the recall; a crowd does not.
    assert measure(crowded, {1: [hit]})["AP"] == pytest.approx(100)
    # With 0.49 of its area inside, it is outside.
    outside = [149, 300, 249, 400, 0, 0.9]
    assert measure(crowded, {1: [outside, hit]})["AP"] == pytest.approx(50)
    assert measure(crowded, {1: [[210, 210, 250, 260, 1, 0.9], hit]})["AP"] == pytest.approx(100)


def draw_images(seed: int, num_images: int, num_classes: int = 3) -> tuple[Truth, Found]:
    """Boxes, some of them crowds, and guesses near them or anywhere, many with equal scores."""
    draw = np.random.default_rng(seed)
    truth: Truth = {}
    found: Found = {}
    for image_id in draw.permutation(1000)[:num_images].tolist():
        corners = draw.uniform(0, 300, (draw.integers(0, 9), 2))
        sides = draw.uniform(10, 200, corners.shape)
        labels = draw.integers(num_classes, size=(len(corners), 1))
        crowd = draw.random(labels.shape) < 0.2
        boxes = np.hstack([corners, corners + sides])
        truth[image_id] = np.hstack([boxes, labels, crowd]).tolist()
        # Moved by less than a third of the shorter side, so that none turns inside out.
        reach = np.repeat(sides.min(axis=1, keepdims=True), 2, axis=0) * 0.3
        near = np.repeat(boxes, 2, axis=0) + draw.uniform(-1, 1, (2 * len(boxes), 4)) * reach
        far = draw.uniform(0, 200, (draw.integers(0, 6), 4))
        far[:, 2:] += far[:, :2] + 10
        guesses = np.vstack([near, far])
        others = draw.integers(num_classes, size=(len(far), 1))
        kinds = np.vstack([np.repeat(labels, 2, axis=0), others])
        scores = draw.integers(1, 20, size=kinds.shape) / 20
        found[image_id] = np.hstack([guesses, kinds, scores]).tolist()
    return truth, found


def other_ap(truth: Truth, found: Found, threshold: float, num_classes: int) -> float:
    """Mean AP at one overlap, from its definition: greedy, 101 recalls, crowds left out."""
    values = []
    for label in range(num_classes):
        guesses = [
            (-row[5], image_id, order, row[:4])
            for image_id, rows in found.items()
            for order, row in enumerate(rows)
            if row[4] == label
        ]
        boxes = {i: [row for row in rows if row[4] == label] for i, rows in truth.items()}
        num_boxes = sum(row[5] == 0 for rows in boxes.values() for row in rows)
        if not num_boxes:
            continue
        taken: dict[int, set[int]] = {i: set() for i in boxes}
        hits = []
        for _, image_id, _, guess in sorted(guesses):
            best, best_overlap = None, threshold
            for number, row in enumerate(boxes[image_id]):
                if row[5] or number in taken[image_id]:
                    continue
                overlap = overlap_of(guess, row[:4])
                if overlap >= best_overlap:
                    best, best_overlap = number, overlap
            if best is not None:
                taken[image_id].add(best)
                hits.append(True)
            elif not any(
                row[5] and overlap_of(guess, row[:4], is_crowd=True) >= threshold
                for row in boxes[image_id]
            ):
                hits.append(False)
        num_hits = np.cumsum(hits)
        precisions = num_hits / np.arange(1, len(hits) + 1)
        recalls = num_hits / num_boxes
        values.append(
            np.mean(
                [max(precisions[recalls >= recall], default=0) for recall in np.linspace(0, 1, 101)]
            )
        )
    return 100 * float(np.mean(values))


def overlap_of(guess: list[float], box: list[float], is_crowd: bool = False) -> float:
    width = min(guess[2], box[2]) - max(guess[0], box[0])
    height = min(guess[3], box[3]) - max(guess[1], box[1])
    both = max(width, 0) * max(height, 0)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (guess, box)]
    return both / (areas[0] if is_crowd else sum(areas) - both)


@pytest.mark.parametrize("seed", range(8))
def test_another_evaluator_gives_the_same(seed: int) -> None:
    truth, found = draw_images(seed, num_images=12)
    values = measure(truth, found)
    by_overlap = {t: other_ap(truth, found, t / 100, 3) for t in range(50, 100, 5)}
    assert values["AP50"] == pytest.approx(by_overlap[50])
    assert values["AP75"] == pytest.approx(by_overlap[75])
    assert values["AP"] == pytest.approx(np.mean([*by_overlap.values()]))
    assert 1 < values["AP"] < 99


def _measure_share(truth: Truth, found: Found) -> dict[str, float]:
    with process_group("cpu"):
        meter = start(truth)
        for image_id in list(truth)[rank() :: world_size()]:
            add(meter, image_id, found[image_id])
        return meter.finish()


@pytest.mark.parametrize("num_images", [1, 11])
def test_ranks_change_nothing(num_images: int) -> None:
    """Not a bit, though scores are equal across images; with one image, other ranks have none."""
    truth, found = draw_images(0, num_images)
    # In another order.
    alone = measure(dict(reversed(truth.items())), found)
    for size in (1, 2, 3):
        assert run_ranks(_measure_share, size, truth, found) == [alone] * size


def test_what_is_there_is_all_found() -> None:
    scenes = open_scenes(None, "val", side=64)
    meter = AveragePrecision(scenes.ground_truth(), scenes.class_ids)
    for index in range(100):
        boxes = scenes.read(index)[1]
        labels = torch.from_numpy(boxes.labels)
        meter.add(boxes.image_id, torch.from_numpy(boxes.boxes), torch.ones(len(labels)), labels)
    assert meter.finish()["AP"] == pytest.approx(100)


def test_nothing_found_is_zero() -> None:
    values = measure(EXAMPLE_TRUTH, {})
    assert values["AP"] == values["AP50"] == values["AR_100"] == 0


def test_only_images_that_were_evaluated_count() -> None:
    """As where an evaluation takes a part of the set."""
    meter = start(EXAMPLE_TRUTH)
    add(meter, 42, [[*EXAMPLE_TRUTH[42][0][:5], 0.5]])
    assert meter.finish()["AP"] == pytest.approx(100)


def test_asking_changes_nothing() -> None:
    ground_truth, ids = lay_out_truth(EXAMPLE_TRUTH)
    before = copy.deepcopy(ground_truth)
    meter = AveragePrecision(ground_truth, ids)
    for image_id, rows in EXAMPLE_FOUND.items():
        add(meter, image_id, rows)
    assert meter.finish() == meter.finish()
    assert ground_truth == before


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    measure(EXAMPLE_TRUTH, EXAMPLE_FOUND)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5])
def test_what_is_not_finite_is_told(value: float, place: int) -> None:
    row = [*EXAMPLE_FOUND[42][0]]
    row[place] = value
    with pytest.raises(NonFiniteError, match="--amp-dtype none"):
        measure(EXAMPLE_TRUTH, {42: [row]})


def test_no_image_is_refused() -> None:
    with pytest.raises(InputError, match="no image to evaluate on"):
        start(EXAMPLE_TRUTH).finish()


def test_nothing_to_find_is_refused() -> None:
    crowd_alone: Truth = {1: [[0, 0, 50, 50, 0, 1]], 2: []}
    with pytest.raises(InputError, match="no box to find"):
        measure(crowd_alone, {2: [[0, 0, 50, 50, 0, 0.5]]})
