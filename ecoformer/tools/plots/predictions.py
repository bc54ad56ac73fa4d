"""Draw what detectors find in held-out images, or which class each pixel gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision.ops import nms

from ecoformer.data.label_maps import IGNORED
from ecoformer.engine.run import Run
from ecoformer.engine.session import create_task
from ecoformer.errors import InputError
from ecoformer.models.dense import RetinaNet
from ecoformer.tasks.dense import DensePrediction, cut_out
from ecoformer.tasks.detection import Detection, find_objects
from ecoformer.tasks.segmentation import label_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Boxes that a detector is less sure of are left out, and of those that overlap all but the surest.
_MIN_SCORE = 0.3
_MAX_OVERLAP = 0.5
# Of classes over an image.
_OPACITY = 0.7
_INCHES = 1.7


def draw_predictions(runs: Sequence[Run], indices: Sequence[int]) -> Figure:
    """Draw validation images, a column each: what is there, and below what each run says.

    Raises:
        InputError: a run neither detects nor segments, or is of another task or other data than
            the first; no such image.
    """
    from matplotlib.figure import Figure

    tasks = [_open_task(run, runs[0]) for run in runs]
    images: Any = tasks[0].open_split("val")
    if not all(0 <= index < len(images) for index in indices):
        raise InputError(f"--images takes numbers from 0 to {len(images) - 1}.")
    figure = Figure(
        figsize=(_INCHES * len(indices), _INCHES * (1 + len(runs))), layout="constrained"
    )
    cells = figure.subplots(1 + len(runs), len(indices), squeeze=False)
    for name, row in zip(["truth", *(run.folder.name for run in runs)], cells, strict=True):
        row[0].set_ylabel(name)
    names = images.class_names
    for index, (top, *others) in zip(indices, cells.T, strict=True):
        image, truth = images.read(index)
        for cell in (top, *others):
            cell.imshow(image, interpolation="nearest")
            cell.set(xticks=[], yticks=[])
        if isinstance(tasks[0], Detection):
            _draw_boxes(top, truth.boxes, truth.labels, names)
        else:
            _draw_classes(top, truth, names)
        for cell, task, run in zip(others, tasks, runs, strict=True):
            batch, sizes, *_ = task.collate()([task.build_transform("val")(image, truth)])
            (size,) = sizes.tolist()
            with torch.inference_mode():
                outputs = run.model(cut_out(batch.unpack(torch.device("cpu"))[0], size))
            if isinstance(run.model, RetinaNet):
                original_size = torch.tensor([image.height, image.width])
                boxes, scores, labels = find_objects(run.model, outputs, size, original_size)
                # An object may be found as several classes.
                kept = nms(boxes, scores, _MAX_OVERLAP)
                kept = kept[scores[kept] >= _MIN_SCORE]
                _draw_boxes(cell, boxes[kept], labels[kept], names)
            else:
                classes = label_pixels(outputs, size, (image.height, image.width))
                _draw_classes(cell, classes.numpy(), names)
    return figure


def _open_task(run: Run, first: Run) -> DensePrediction:
    task = create_task(run.config, None)
    if not isinstance(task, DensePrediction):
        raise InputError(f"{run.folder} neither detects nor segments; give a run that does.")
    if _name_images(run) != _name_images(first):
        raise InputError(f"{run.folder} has another task or other data than {first.folder}.")
    return task


def _name_images(run: Run) -> tuple[object, ...]:
    data = run.config.data
    return run.config.run.task, data.data_set, data.data_path, data.short_side


def _draw_boxes(axes: Axes, boxes: Any, labels: Any, names: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, color="white")
        )
        axes.text(left, top, names[label], color="white", fontsize="x-small", va="bottom")


def _draw_classes(axes: Axes, labels: Any, names: Sequence[str]) -> None:
    # Pixels of no class stay as they are.
    labels = np.ma.masked_equal(np.asarray(labels), IGNORED)
    axes.imshow(labels, alpha=_OPACITY, cmap="tab20", vmin=0, vmax=len(names) - 1)
