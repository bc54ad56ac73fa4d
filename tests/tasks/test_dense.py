"""Detection and segmentation are tasks like any other: as safe, and equal on all ranks."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ecoformer.checkpoint import read_checkpoint
from ecoformer.config import Config, make_config
from ecoformer.config.merge import merge
from ecoformer.data import scenes
from ecoformer.data.boxes import Boxes
from ecoformer.engine.run import evaluate, load_run, time_model, train
from ecoformer.engine.session import create_task, move_to
from ecoformer.errors import InputError, NonFiniteError, Preempted
from ecoformer.hashing import fit_hash_functions
from ecoformer.models.dense import RetinaNet
from ecoformer.models.registry import find_family
from ecoformer.tasks import detection, segmentation
from ecoformer.tasks.dense import DensePrediction
from tests.engine.ranks import run_ranks
from tests.engine.training import assert_same_run
from tests.problems import LargestTensor
from tests.tasks.tiny_pyramid import FAMILY, shrink
from tests.tasks.toy import stop_at

TASKS = {"detection": "test_AP", "segmentation": "test_mIoU"}


def configure(folder: Path, **fields: object) -> Config:
    """Two epochs of two steps on canvases of 64 pixels, each with a fit, on the CPU."""
    return merge(
        {
            **{"data_set": "SCENES", "short_side": 64, "device": "cpu", "output_dir": str(folder)},
            **{"epochs": 2, "epoch_samples": 8, "batch_size": 4, "num_workers": 0},
            **{"num_bits": 4, "num_anchors": 6, "num_fit_steps": 2, "refit_every_epochs": 1},
            **fields,
        },
        FAMILY,
    )


def create(config: Config) -> DensePrediction:
    task = create_task(config)
    assert isinstance(task, DensePrediction)
    return task


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three canvases to evaluate on."""
    shrink(monkeypatch)


@pytest.mark.parametrize("task", TASKS)
def test_it_is_trained_evaluated_opened_and_timed(task: str, tmp_path: Path) -> None:
    config = configure(tmp_path, task=task, epochs=1)
    last = train(config, family=FAMILY).log[-1]
    metrics = evaluate(config, family=FAMILY)
    assert metrics.primary == TASKS[task]
    assert metrics.values == {name: last[name] for name in metrics.values}
    model = load_run(tmp_path, family=FAMILY).model
    assert set(read_checkpoint(tmp_path / "last_checkpoint.pth")["model"]) == set(
        model.state_dict()
    )
    assert "images/s" in str(time_model(config, family=FAMILY))


@pytest.mark.parametrize("task", TASKS)
def test_its_loss_falls(task: str, tmp_path: Path) -> None:
    config = configure(tmp_path, task=task, epoch_samples=64, lr=0.128)
    losses = [line["train_loss"] for line in train(config, family=FAMILY).log]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("task", TASKS)
def test_it_goes_on_exactly_where_it_was_stopped(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (configure(tmp_path / name, task=task) for name in ("whole", "stopped"))
    train(whole, family=FAMILY)
    with monkeypatch.context() as patch:
        # By SIGTERM, in the first step of the second epoch.
        stop_at(2, patch)
        with pytest.raises(Preempted, match="saved at epoch 1, step 1"):
            train(stopped, family=FAMILY)
    train(stopped, family=FAMILY)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def _train_pair(folder: Path, task: str, update: int | None) -> str:
    """Both ranks train; rank 1 alone gets the signal."""
    patch = pytest.MonkeyPatch()
    shrink(patch)
    if update is not None and os.environ["RANK"] == "1":
        stop_at(update, patch)
    try:
        train(configure(folder, task=task, batch_size=2), family=FAMILY)
    except Preempted as stop:
        return str(stop.exit_code)
    return "done"


@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_stop_and_go_on_together(task: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_ranks(_train_pair, 2, whole, task, None) == ["done", "done"]
    assert run_ranks(_train_pair, 2, stopped, task, 2) == ["75", "75"]
    assert run_ranks(_train_pair, 2, stopped, task, None) == ["done", "done"]
    assert_same_run(stopped, whole)


def _evaluate(folder: Path, task: str, num_canvases: int) -> dict[str, float]:
    shrink(pytest.MonkeyPatch(), num_canvases)
    return dict(evaluate(configure(folder, task=task), family=FAMILY).values)


@pytest.mark.parametrize("task", TASKS)
def test_ranks_with_one_image_or_none_give_the_same(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path, task=task, epochs=1, lr=0.1)
    train(config, family=FAMILY)
    alone = evaluate(config, family=FAMILY).values
    assert run_ranks(_evaluate, 3, tmp_path, task, 3) == [alone] * 3
    scenes.NUM_CANVASES["val"] = 1
    assert (
        run_ranks(_evaluate, 2, tmp_path, task, 1) == [evaluate(config, family=FAMILY).values] * 2
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_classifier_starts_the_backbone(
    task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its softmax weights become EcoFormer's; of the heads, nothing is in the file."""
    classifier = FAMILY.create_model("tiny_pyramid", "msa", num_classes=7)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    caplog.set_level(logging.INFO, "ecoformer")
    config = configure(
        tmp_path / "run", task=task, finetune=str(tmp_path / "classifier.pth"), epochs=1, lr=0.0
    )
    model = train(config, family=FAMILY).model
    body = model.get_submodule("backbone.body").state_dict()
    given = classifier.state_dict()
    assert torch.equal(body["patch_embed2.proj.weight"], given["patch_embed2.proj.weight"])
    third = given["block1.0.attn.qkv.weight"].chunk(3)[0]
    assert torch.equal(body["block1.0.attn.to_qk.weight"], third)
    assert "2 unused (head)" in caplog.text and "All behind the backbone is fresh" in caplog.text


def test_a_network_of_other_classes_starts_all_but_the_classifier(tmp_path: Path) -> None:
    for task in TASKS:
        made = create(configure(tmp_path, task=task))
        old, new = (
            made.build_network(FAMILY.create_model("tiny_pyramid", "sra"), num_classes)
            for num_classes in (3, 5)
        )
        torch.save(old.state_dict(), tmp_path / "old.pth")
        report = made.start_from(new, tmp_path / "old.pth", allow_missing=False)
        assert len(report.missing) == 2 and not report.unused
        assert "3 classes in the file, 5 in the model" in str(report)
        taken = set(new.state_dict()) - set(report.missing)
        assert all(torch.equal(new.state_dict()[name], old.state_dict()[name]) for name in taken)


@pytest.mark.parametrize("task", TASKS)
def test_a_fit_sees_whole_images_and_no_padding(task: str, tmp_path: Path) -> None:
    made = create(configure(tmp_path, task=task))
    sizes = torch.tensor([[40, 70], [50, 60], [30, 30], [50, 60]])
    images = torch.zeros(4, 3, 64, 96)
    for number, (height, width) in enumerate(sizes.tolist(), 1):
        images[number - 1, :, :height, :width] = number
    inputs = made.fit_inputs((images, sizes, []))
    assert inputs.shape == (2, 3, 50, 60)
    assert inputs.unique().tolist() == [2, 4]


def test_a_fit_on_a_large_image_never_holds_all_pairs_of_tokens(tmp_path: Path) -> None:
    made = create(configure(tmp_path, task="detection"))
    hashing = made.config.hashing
    model = made.build_network(FAMILY.create_model("tiny_pyramid", "ecoformer", hashing=hashing), 3)
    images, sizes = torch.randn(1, 3, 320, 544), torch.tensor([[320, 533]])
    num_tokens = 80 * 134
    with LargestTensor() as largest:
        fits = fit_hash_functions(model, made.fit_inputs((images, sizes, [])))
    assert len(fits) == 3
    assert largest.numel < num_tokens**2 / 20


class Recorder(nn.Module):
    """Keeps what the network is called with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Any:
        self.seen.append(tuple(images.shape))
        return self.network(images)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_found_does_not_depend_on_the_rest_of_a_batch(task: str, tmp_path: Path) -> None:
    """An image beside a larger one gives the same figures as alone."""
    config = configure(tmp_path, task=task)
    made = create(config)
    data = made.open_data(torch.device("cpu"), is_train=False)
    torch.manual_seed(0)
    network = Recorder(made.build_network(FAMILY.create_model("tiny_pyramid", "msa"), 11)).eval()
    [(images, sizes, *rest)] = [move_to(batch, torch.device("cpu")) for batch in data.eval]
    wide = torch.nn.functional.pad(images, (0, 32, 0, 64))
    found = []
    for batch in (images, wide):
        meter = made.start_evaluation(torch.device("cpu"))
        with torch.inference_mode():
            meter.add(network, (batch, sizes, *rest))
        found.append(meter.finish().values)
    assert found[0] == found[1]
    assert network.seen == [(1, 3, 64, 64)] * 6


class Picture:
    """One image of 40 x 60 pixels, grey, which is to be looked at twice as large."""

    class_names = ("left", "right")
    class_ids = (7, 3)
    boxes = ((4.0, 6.0, 20.0, 30.0), (31.0, 5.0, 58.0, 38.0))

    def __init__(self, task: str) -> None:
        self.task = task

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> tuple[Image.Image, Any]:
        labels = np.repeat(np.arange(2, dtype=np.uint8), 30)[None].repeat(40, axis=0)
        found = Boxes(
            boxes=np.array(self.boxes, np.float32),
            labels=np.arange(2),
            is_crowd=np.zeros(2, bool),
            image_id=5,
            size=(40, 60),
        )
        return Image.new("RGB", (60, 40)), found if self.task == "detection" else labels

    def ground_truth(self) -> dict[str, Any]:
        annotations = [
            {"id": number, "image_id": 5, "category_id": id_, "iscrowd": 0}
            | {"bbox": [left, top, right - left, bottom - top], "area": 400.0}
            for number, (id_, (left, top, right, bottom)) in enumerate(
                zip(self.class_ids, self.boxes, strict=True), 1
            )
        ]
        return {
            "images": [{"id": 5, "height": 40, "width": 60}],
            "annotations": annotations,
            "categories": [{"id": id_, "name": str(id_)} for id_ in self.class_ids],
        }

    def describe(self, index: int) -> str:
        return "a picture"

    def fingerprint(self) -> Any:
        return {}


def know_boxes(model: RetinaNet, images: Tensor) -> dict[str, Any]:
    """What a network gives that knows the boxes of the picture, twice as large."""
    outputs = model(images)
    outputs["cls_logits"].fill_(-9)
    anchors = model._draw_anchors(outputs)
    for label, corners in enumerate(Picture.boxes):
        box = 2 * torch.tensor(corners)
        place = (anchors - box).abs().sum(-1).argmin()
        [offsets] = model.box_coder.encode([box[None]], [anchors[place, None]])
        outputs["bbox_regression"][0, place] = offsets[0]
        outputs["cls_logits"][0, place, label] = 4
    return outputs


def know_halves(model: nn.Module, images: Tensor) -> Tensor:
    """The same of halves: logits of the padded image."""
    assert images.shape == (1, 3, 96, 128)
    logits = torch.zeros(1, 2, 96, 128)
    logits[:, 0, :, :60] = logits[:, 1, :, 60:] = 5
    return logits


@torch.inference_mode()
@pytest.mark.parametrize(
    ("task", "know", "perfect"),
    [
        ("detection", know_boxes, {"test_AP": 100.0, "test_AP75": 100.0}),
        ("segmentation", know_halves, {"test_mIoU": 100.0, "test_aAcc": 100.0}),
    ],
)
def test_who_knows_it_all_is_perfect_in_pixels_of_the_original(
    task: str, know: Any, perfect: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((detection, "open_boxes"), (segmentation, "open_label_maps")):
        monkeypatch.setattr(module, name, lambda *_, **__: Picture(task))
    made = create(configure(tmp_path, task=task, short_side=80, data_set="COCO"))
    data = made.open_data(torch.device("cpu"), is_train=False)
    model = made.build_network(FAMILY.create_model("tiny_pyramid", "msa"), 2).eval()
    meter = made.start_evaluation(torch.device("cpu"))
    for batch in data.eval:
        meter.add(lambda images: know(model, images), move_to(batch, torch.device("cpu")))
    values = meter.finish().values
    assert {name: values[name] for name in perfect} == pytest.approx(perfect)


@pytest.mark.parametrize("task", TASKS)
def test_an_output_that_is_not_finite_is_no_figure(task: str, tmp_path: Path) -> None:
    config = configure(tmp_path, task=task)
    made = create(config)
    data = made.open_data(torch.device("cpu"), is_train=False)
    network = made.build_network(FAMILY.create_model("tiny_pyramid", "msa"), 11).eval()
    nn.init.constant_(next(network.get_submodule("backbone.fpn").parameters()), float("nan"))
    meter = made.start_evaluation(torch.device("cpu"))
    with torch.inference_mode():
        meter.add(network, move_to(next(iter(data.eval)), torch.device("cpu")))
    with pytest.raises(NonFiniteError, match="not finite"):
        meter.finish()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixup": 0.8}, "mixup 0.8 is for classification, and --task .* has 0.0"),
        ({"input_size": 512}, "input_size 512 is no size of .* has short_side"),
        ({"max_tokens": 64}, "max_tokens 64 is no size of"),
        ({"data_set": "DIGITS"}, "--data-set DIGITS has nothing for --task"),
        ({"data_set": "COCO"}, "data"),
        ({"data_path": "no/such/folder"}, "no/such/folder is no folder"),
        ({"short_side": 48}, "has 64 to 1024 pixels a side, not 48"),
        ({"distill": "logits", "teacher": "softmax.pth"}, "compares logits, and --task"),
    ],
)
def test_what_cannot_be_trained(
    task: str, fields: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        train(configure(tmp_path, task=task, **fields), family=FAMILY)


@pytest.mark.parametrize(
    ("task", "fields", "words"),
    [
        ("detection", {"long_side": 63}, "long_side is 63; expected at least short_side, 64"),
        ("segmentation", {"long_side": 512}, "long_side 512 is no size of .* has short_side;"),
        ("segmentation", {"cutmix_minmax": (0.2, 0.8)}, "cutmix_minmax .* is for classification"),
    ],
)
def test_what_means_nothing_to_one_of_them(
    task: str, fields: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        train(configure(tmp_path, task=task, **fields), family=FAMILY)


@pytest.mark.parametrize("model", ["deit_tiny_patch16_224", "vit_canvas"])
def test_a_backbone_without_a_pyramid_is_refused(model: str, tmp_path: Path) -> None:
    config = make_config(
        task="detection", model=model, data_set="SCENES", short_side=64, device="cpu",
        output_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"takes maps of strides 8, 16, 32, and this backbone"):
        train(config)


@pytest.mark.parametrize(
    ("model", "keywords", "words"),
    [
        ("pit_ti_224", {}, "images of any size, which pit_ti_224 does not take .*; name another"),
        ("swin_tiny_patch4_window7_224", {}, "give --model-kwargs strict_img_size=False"),
        ("swin_tiny_patch4_window7_224", {"strict_img_size": False}, ""),
    ],
)
def test_a_backbone_of_one_size_of_images_is_refused_when_it_is_built(
    model: str, keywords: dict[str, object], words: str, tmp_path: Path
) -> None:
    task = create_task(make_config(task="detection", model=model, output_dir=tmp_path))
    assert isinstance(task, DensePrediction)
    family = find_family(model)
    build = partial(family.create_empty, model, "msa", input_size=224, **keywords)
    if words:
        with pytest.raises(InputError, match=words) as caught:
            task.build_model(build, 5)
        assert "\n" not in str(caught.value)
    else:
        task.build_model(build, 5)


def test_a_detector_learns_from_its_softmax_parent(tmp_path: Path) -> None:
    parent = configure(tmp_path / "parent", task="detection", attn_type="msa", epochs=1)
    train(parent, family=FAMILY)
    file = str(tmp_path / "parent" / "last_checkpoint.pth")
    fields = {"task": "detection", "epochs": 1, "finetune": file}
    plain, distilled = (
        train(configure(tmp_path / name, **fields, **more), family=FAMILY).log[-1]["train_loss"]
        for name, more in (("plain", {}), ("distilled", {"distill": "output", "teacher": file}))
    )
    assert distilled > plain
