"""Predictions as pictures: what is there, and what a run's model says of the same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torchvision.ops import box_iou

from ecoformer.config import make_config
from ecoformer.data.label_maps import IGNORED
from ecoformer.data.pixels import normalize
from ecoformer.data.scenes import SceneMaps, open_scenes
from ecoformer.engine.run import Run, load_run, train
from ecoformer.errors import InputError
from ecoformer.models.dense import RetinaNet
from ecoformer.tools.plots import predictions
from ecoformer.tools.plots.command import main
from ecoformer.tools.plots.predictions import draw_predictions

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    monkeypatch.setattr("ecoformer.data.scenes.NUM_CANVASES", {"train": 2, "val": 2})

    def make(task: str, side: int = 96) -> Run:
        folder = tmp_path / f"{task}{side}"
        fields: dict[str, Any] = {
            "task": task,
            "model": "pvt_v2_b0",
            "attn_type": "msa",
            "data_set": "SCENES",
        }
        fields |= {"short_side": side, "epochs": 1, "num_workers": 0, "device": "cpu"}
        fields["eval_samples"] = 1
        train(make_config(**fields, output_dir=str(folder)))
        return load_run(folder)

    return make


def rectangles(axes: Axes) -> list[tuple[float, ...]]:
    boxes = [patch.get_bbox() for patch in axes.patches if isinstance(patch, Rectangle)]
    return [tuple(box.extents) for box in boxes]


def test_boxes_are_those_of_the_canvas_and_of_the_model(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("detection")
    # One that has learned nothing is sure of nothing.
    assert isinstance(run.model, RetinaNet)
    run.model.score_thresh = 0.0
    monkeypatch.setattr(predictions, "_MIN_SCORE", 0.0)
    figure = draw_predictions([run], [1, 0])
    cells = np.reshape(np.array(figure.axes, dtype=object), (2, 2))
    assert [cell.get_ylabel() for cell in cells[:, 0]] == ["truth", "detection96"]
    scenes = open_scenes(None, "val", side=96)
    for cell, index in zip(cells[0], (1, 0), strict=True):
        _, boxes = scenes.read(index)
        assert rectangles(cell) == [tuple(box) for box in boxes.boxes.tolist()]
        assert [text.get_text() for text in cell.texts] == [str(label) for label in boxes.labels]
    for cell in cells[1]:
        found = np.array(rectangles(cell))
        assert 1 <= len(found) <= 100
        assert found.min() >= 0 and found.max() <= 96
        overlaps = box_iou(*[torch.from_numpy(found)] * 2).fill_diagonal_(0)
        assert overlaps.max() <= 0.5


def test_classes_are_those_of_the_map_and_of_the_model(make_run: MakeRun) -> None:
    run = make_run("segmentation")
    figure = draw_predictions([run], [0])
    truth, said = (np.asarray(axes.images[1].get_array()) for axes in figure.axes)
    image, labels = SceneMaps(open_scenes(None, "val", side=96)).read(0)
    assert np.array_equal(truth, labels)
    pixels = normalize(torch.from_numpy(np.array(image))[None])
    with torch.inference_mode():
        assert np.array_equal(said, run.model(pixels).argmax(1)[0])


def test_pixels_of_no_class_stay_as_they_are(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read = make_run("segmentation"), SceneMaps.read

    def read_with_a_hole(maps: SceneMaps, index: int) -> tuple[Image.Image, np.ndarray]:
        image, labels = read(maps, index)
        labels[:5, :7] = IGNORED
        return image, labels

    monkeypatch.setattr(SceneMaps, "read", read_with_a_hole)
    shown = draw_predictions([run], [0]).axes[0].images[1].get_array()
    assert shown is not None and np.ma.getmaskarray(shown).nonzero()[0].size == 5 * 7


def test_bad_input_is_one_line(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run("segmentation", side) for side in (96, 128)]
    with pytest.raises(InputError, match="other data than"):
        draw_predictions(runs, [0])
    with pytest.raises(InputError, match="numbers from 0 to 1"):
        draw_predictions(runs[:1], [2])
    assert main(["predictions", str(tmp_path / "none"), "--output", str(tmp_path / "p.png")]) == 2
    assert "is no run" in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()
