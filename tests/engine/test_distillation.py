"""A softmax teacher beside the network: what is compared, and that nothing else changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pvt
import twins
from ecoformer.checkpoint import read_checkpoint
from ecoformer.config import Config, make_config
from ecoformer.engine.distillation import Distillation
from ecoformer.engine.run import evaluate, load_run, train
from ecoformer.engine.session import create_model
from ecoformer.errors import InputError, Preempted
from ecoformer.hashing import fit_hash_functions
from ecoformer.tasks.base import Network
from ecoformer.tasks.classification import Classification
from tests.engine.ranks import run_ranks
from tests.engine.training import CPU, assert_equal, assert_same_state, weights
from tests.tasks.toy import stop_at

# Of the tiny images, eight at a time.
NUM_STEPS = 3
# Of PVTv2-B0, those that are made of softmax attention.
LAYERS = [f"block{i}.{j}.attn" for i in (1, 2, 3) for j in (0, 1)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a softmax PVTv2-B0 for two classes."""
    file = tmp_path_factory.mktemp("teacher") / "softmax.pth"
    torch.manual_seed(1)
    torch.save(pvt.create_model("pvt_v2_b0", "msa", num_classes=2).state_dict(), file)
    return file


@pytest.fixture
def configure(image_folder: Path, tmp_path: Path, teacher: Path) -> Callable[..., Config]:
    """Two epochs with a fit each; outputs are compared."""

    def make(folder: str = "run", **fields: object) -> Config:
        return make_config(
            **{
                **{"model": "pvt_v2_b0", "attn_type": "ecoformer", "distill": "output"},
                **{"teacher": teacher, "data_path": image_folder, "device": "cpu"},
                **{"output_dir": tmp_path / folder, "batch_size": 8, "num_workers": 0},
                **{"repeated_aug": False, "input_size": 32, "epochs": 2, "warmup_epochs": 0},
                **{
                    "num_anchors": 8,
                    "num_fit_steps": 2,
                    "refit_every_epochs": 1,
                    "lr": 0.05,
                    **fields,
                },
            }
        )

    return make


def start(config: Config) -> tuple[Distillation, nn.Module, nn.Module]:
    """A task with its student and its teacher, before the first step."""
    task = Distillation(Classification(config))
    task.open_data(CPU, is_train=True)
    student = create_model(config, task).eval()
    if config.model.attn_type == "ecoformer":
        images = torch.randn(8, 3, 32, 32)
        fit_hash_functions(student, images, torch.Generator().manual_seed(0))
    return task, student, task._teacher


def draw_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 1, 0])


def run_watched(model: nn.Module, images: Tensor, layers: list[str]) -> dict[str, Any]:
    """Run a model; the logits, and the output of each layer after its projection by its name."""
    seen: dict[str, Any] = {}
    handles = [
        model.get_submodule(f"{name}.proj").register_forward_hook(
            lambda _, args, output, name=name: seen.__setitem__(name, output)
        )
        for name in layers
    ]
    seen["logits"] = model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("distill", "model", "attn_type"),
    [
        ("output", "pvt_v2_b0", "ecoformer"),
        ("logits", "pvt_v2_b0", "ecoformer"),
        ("both", "pvt_v2_b0", "ecoformer"),
        ("both", "pvt_v2_b0", "msa_share_qk"),
        ("both", "pvt_v2_b0", "performer"),
        ("both", "pcpvt_small_v0", "ecoformer"),
    ],
)
def test_loss_is_that_of_the_formula(
    distill: str, model: str, attn_type: str, configure: Callable[..., Config], tmp_path: Path
) -> None:
    layers, fields = LAYERS, dict[str, object]()
    if distill != "logits":
        fields["distill_weight"] = 7.0
    if model != "pvt_v2_b0":
        depths = twins.TWINS_VARIANTS[model].depths[:3]
        layers = [f"blocks.{i}.{j}.attn" for i, depth in enumerate(depths) for j in range(depth)]
        file = tmp_path / "softmax.pth"
        torch.save(twins.create_model(model, "msa", num_classes=2).state_dict(), file)
        fields["teacher"] = file
    config = configure(model=model, attn_type=attn_type, distill=distill, **fields)
    task, student, teacher = start(config)
    images, labels = draw_batch()
    ours, theirs = (run_watched(m, images, layers) for m in (student, teacher))
    expected = F.cross_entropy(ours["logits"], labels, label_smoothing=0.1)
    if distill != "output":
        p, q = (seen["logits"].double().softmax(-1) for seen in (theirs, ours))
        expected = (p * (p / q).log()).sum(-1).mean()
    if distill != "logits":
        errors = [(ours[name] - theirs[name]).square().mean() for name in layers]
        expected = expected + 7.0 * sum(errors) / len(errors)
    loss = task.loss(student, (0, (images, labels)))
    torch.testing.assert_close(loss, expected.to(loss), rtol=1e-5, atol=1e-7)

    loss.backward()
    assert all(
        p.grad is not None and p.grad.any() for p in student.get_submodule("head").parameters()
    )
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


def test_first_steps_give_each_layer_the_input_of_the_teachers(
    configure: Callable[..., Config],
) -> None:
    task, student, teacher = start(configure(align_steps=4))
    taken: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for key, model in (("student", student), ("teacher", teacher)):
        for name in ("block1.0.attn", "block2.1.attn", "block3.1.attn", "block4.0.attn"):
            # A hook behind those of the task: it sees what the layer gets.
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, key=key: taken[key].append(args[0])
            )
    batch = draw_batch()
    task.loss(student, (3, batch)).backward()
    same = [torch.equal(*pair) for pair in zip(*taken.values(), strict=True)]
    # That of the last stage is softmax in both.
    assert same == [True, True, True, False]
    # DistributedDataParallel waits for a gradient of each.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    before_layer = student.get_parameter("block2.0.norm1.weight")
    assert before_layer.grad is not None and not before_layer.grad.any()

    for values in taken.values():
        values.clear()
    student.zero_grad(set_to_none=False)
    task.loss(student, (4, batch)).backward()
    same = [torch.equal(*pair) for pair in zip(*taken.values(), strict=True)]
    assert not any(same)
    assert before_layer.grad.any()


def test_outside_of_a_loss_the_network_is_its_own(configure: Callable[..., Config]) -> None:
    task, student, _ = start(configure(align_steps=4))
    images, _ = draw_batch()
    before = student(images)
    task.loss(student, (0, draw_batch()))
    assert torch.equal(student(images), before)
    # Nor does it keep what it saw.
    assert not any(tap.taken.numel() or tap.substitute for pair in task._pairs for tap in pair)


def test_a_teacher_of_no_weight_changes_nothing(configure: Callable[..., Config]) -> None:
    """Random numbers, fits, the optimiser and what is saved are as without it."""
    watched = train(configure("watched", distill_weight=0.0))
    alone = train(configure("alone", distill="none", teacher=None))
    assert_equal(weights(watched.model), weights(alone.model))
    assert watched.log == alone.log
    first, second = (
        read_checkpoint(run.folder / "last_checkpoint.pth") for run in (watched, alone)
    )
    assert first["optimizer_names"] == second["optimizer_names"]
    assert first["config"].keys() - second["config"].keys() == {"teacher_digest"}


def test_outputs_come_nearer_to_the_teachers(configure: Callable[..., Config]) -> None:
    task, student, teacher = start(configure(distill_weight=1000.0))
    images, labels = draw_batch()

    @torch.no_grad()
    def measure_error() -> float:
        ours, theirs = (run_watched(m, images, LAYERS) for m in (student, teacher))
        return sum(F.mse_loss(ours[name], theirs[name]).item() for name in LAYERS)

    before = measure_error()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    for step in range(20):
        optimizer.zero_grad()
        task.loss(student, (step, (images, labels))).backward()
        optimizer.step()
    assert measure_error() < 0.5 * before


def test_evaluation_needs_no_teacher(configure: Callable[..., Config], tmp_path: Path) -> None:
    copy = tmp_path / "copy.pth"
    shutil.copy(configure().distillation.teacher or "", copy)
    config = configure(teacher=copy, epochs=1)
    [record] = train(config).log
    copy.unlink()
    assert evaluate(config).values["test_loss"] == record["test_loss"]
    assert not load_run(tmp_path / "run").model.training
    with pytest.raises(InputError, match=r"copy\.pth: no such file"):
        train(config)


def _train_pair(config: Config, update: int | None) -> str:
    """Both ranks train; rank 1 alone gets the signal."""
    if update is not None and os.environ["RANK"] == "1":
        stop_at(update, pytest.MonkeyPatch())
    try:
        train(config)
    except Preempted as stop:
        return str(stop.exit_code)
    return "done"


def test_two_ranks_go_on_exactly_where_they_were_stopped(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    """In the middle of an epoch, among the steps of alignment, which end in the next one."""
    fields = {"batch_size": 4, "align_steps": NUM_STEPS + 1, "distill": "both"}
    whole, stopped = configure("whole", **fields), configure("stopped", **fields)
    assert run_ranks(_train_pair, 2, whole, None) == ["done", "done"]
    assert run_ranks(_train_pair, 2, stopped, 1) == ["75", "75"]
    found = read_checkpoint(tmp_path / "stopped" / "last_checkpoint.pth")
    assert (found["epoch"] + 1, found["step"]) == (0, 2)
    assert run_ranks(_train_pair, 2, stopped, None) == ["done", "done"]
    for name in ("last_checkpoint.pth", "best_checkpoint.pth"):
        assert_same_state(tmp_path / "whole" / name, tmp_path / "stopped" / name)
    logs = [(tmp_path / name / "log.txt").read_bytes() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]


def test_a_run_goes_on_with_its_teacher_alone(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    config = configure(epochs=1)
    train(config)
    moved, other = tmp_path / "moved.pth", tmp_path / "other.pth"
    shutil.copy(str(config.distillation.teacher), moved)
    torch.save(pvt.create_model("pvt_v2_b0", "msa", num_classes=2).state_dict(), other)
    train(configure(epochs=1, teacher=moved))
    with pytest.raises(InputError, match=r"other settings \(teacher_digest '.*' -> '.*'\)"):
        train(configure(epochs=1, teacher=other))
    with pytest.raises(InputError, match=r"distill 'output' -> 'none'.*teacher_digest"):
        train(configure(epochs=1, distill="none", teacher=None))


class Regression(Classification):
    """A loss of its own, on two calls of the network, and no logits."""

    has_logits = False

    def loss(self, network: Network, batch: Any) -> Tensor:
        images, targets = batch
        guesses = torch.cat([network(half) for half in images.chunk(2)])
        return F.mse_loss(guesses[:, 0], targets[:, 0])


def test_any_task_has_its_outputs_compared(configure: Callable[..., Config]) -> None:
    plain = train(configure("plain", distill="none", teacher=None), task=Regression)
    distilled = train(configure("distilled"), task=Regression)
    assert distilled.log[0]["train_loss"] > plain.log[0]["train_loss"]
    with pytest.raises(InputError, match="--distill both compares logits, and --task"):
        train(configure("logits", distill="both"), task=Regression)


@pytest.mark.slow
def test_a_compiled_network_is_watched_as_well(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    fields: dict[str, Any] = {"epochs": 1, "align_steps": 2}
    runs = [train(configure(f"{on}", compile=on, **fields)) for on in (True, False)]
    assert runs[0].log == runs[1].log


def save_model(file: Path, attention: str, variant: str = "pvt_v2_b0", classes: int = 2) -> Path:
    torch.save(pvt.create_model(variant, attention, num_classes=classes).state_dict(), file)
    return file


@pytest.mark.parametrize(
    ("attention", "variant", "classes", "words"),
    [
        ("msa", "pvt_v2_b1", 2, "entries have another shape"),
        ("ecoformer", "pvt_v2_b0", 2, "of the model's 138 have no source"),
        ("sra", "pvt_v2_b0", 2, "16 derived"),
        ("msa", "pvt_v2_b0", 3, "3 classes in the file, 2 in the model"),
    ],
)
def test_teacher_of_another_model(
    attention: str,
    variant: str,
    classes: int,
    words: str,
    configure: Callable[..., Config],
    tmp_path: Path,
) -> None:
    file = save_model(tmp_path / "other.pth", attention, variant, classes)
    with pytest.raises(InputError, match=rf"softmax stage.*pvt_v2_b0/msa.*other\.pth.*{words}"):
        train(configure(teacher=file))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"teacher": "/no/such/file.pth"}, r"/no/such/file\.pth: no such file"),
        ({"teacher": None}, "--distill output needs a teacher"),
        ({"distill": "none"}, "--teacher is for distillation alone"),
        ({"distill": "logits", "align_steps": 1}, "--align-steps 1 needs attention outputs"),
        ({"distill": "logits", "distill_weight": 1.0}, "--distill-weight 1.0 needs attention out"),
        ({"align_steps": 2 * NUM_STEPS + 1}, "--align-steps 7 are more than the 6 steps"),
        ({"attn_type": "msa"}, "pvt_v2_b0/msa has none"),
        ({"attn_type": "sra"}, "pvt_v2_b0/sra has none"),
    ],
)
def test_settings_that_cannot_be(
    fields: dict[str, object], words: str, configure: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        train(configure(**fields))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
