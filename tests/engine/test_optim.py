"""Optimiser groups and learning rates against the released recipe."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pvt
from ecoformer.config import Config
from ecoformer.engine import optim
from ecoformer.engine.optim import (
    create_optimizer,
    create_schedule,
    restore_schedule,
    scale_learning_rate,
    schedule_state,
)
from ecoformer.errors import InputError

RECIPES = ("pvt_v2_ecoformer", "pvt_v2_msa", "twins_ecoformer")


def golden(golden_dir: Path, recipe: str) -> dict[str, Any]:
    return json.loads((golden_dir / "lr_schedule.json").read_text())[recipe]


def rates(config: Config, peak_lr: float, num_epochs: int) -> list[float]:
    """The learning rate of each epoch, with the schedule stepped as the loop does."""
    optimizer = create_optimizer(nn.Linear(2, 2), config.optim, peak_lr)
    schedule = create_schedule(optimizer, config.optim, seed=config.run.seed)
    seen = []
    for epoch in range(num_epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        schedule.step(epoch, 50.0)
    return seen


@pytest.mark.parametrize("recipe", RECIPES)
def test_learning_rate_of_each_epoch(recipe: str, golden_dir: Path) -> None:
    expected = golden(golden_dir, recipe)
    names = ("epochs", "lr", "warmup_lr", "min_lr", "warmup_epochs", "batch_size")
    config = Config.from_flat({name: expected[name] for name in names})
    peak_lr = scale_learning_rate(
        config.optim, batch_size=config.data.batch_size, world_size=expected["world_size"]
    )
    assert rates(config, peak_lr, expected["epochs"]) == pytest.approx(
        expected["lr_used_in_epoch"], rel=1e-9, abs=0
    )


def test_parameter_groups(golden_dir: Path) -> None:
    expected = golden(golden_dir, "pvt_v2_ecoformer")
    model = pvt.create_model("pvt_v2_b0", "ecoformer")
    optimizer = create_optimizer(model, Config().optim, 1e-3)
    assert type(optimizer).__name__ == expected["opt"]
    assert optimizer.defaults["betas"] == tuple(expected["betas"])
    assert optimizer.defaults["eps"] == expected["eps"]
    assert [
        {"weight_decay": group["weight_decay"], "tensors": len(group["params"])}
        for group in optimizer.param_groups
    ] == expected["groups"]
    without = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in without) == (parameter.ndim < 2), name


def test_model_names_tensors_without_decay() -> None:
    class Model(nn.Linear):
        def no_weight_decay(self) -> set[str]:
            return {"weight"}

    groups = create_optimizer(Model(2, 2), Config().optim, 1e-3).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.0, 2)]


def test_accumulated_batches_raise_the_peak() -> None:
    config = Config.from_flat({"lr": 1e-3, "grad_accum_steps": 4})
    assert scale_learning_rate(config.optim, batch_size=32, world_size=2) == pytest.approx(5e-4)


@pytest.mark.parametrize(
    "flags",
    [
        {"sched": "cosine", "lr_noise": [0.2, 0.9]},
        {"sched": "step", "decay_epochs": 2.0},
        {"sched": "plateau", "patience_epochs": 1, "warmup_epochs": 1},
        {"sched": "plateau", "patience_epochs": 1, "warmup_epochs": 1, "lr_noise": [0.3]},
    ],
)
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
def test_schedule_goes_on_where_it_was(flags: dict[str, Any]) -> None:
    config = Config.from_flat({"epochs": 12, "warmup_epochs": 2, **flags})
    whole = rates(config, 1e-3, 12)
    assert len(set(whole)) > 3

    model = nn.Linear(2, 2)
    first = create_optimizer(model, config.optim, 1e-3)
    schedule = create_schedule(first, config.optim, seed=0)
    for epoch in range(6):
        schedule.step(epoch, 50.0)
    file = io.BytesIO()
    torch.save([first.state_dict(), schedule_state(schedule)], file)
    file.seek(0)
    optimizer_state, state = torch.load(file, weights_only=True)

    second = create_optimizer(model, config.optim, 1e-3)
    resumed = create_schedule(second, config.optim, seed=0)
    second.load_state_dict(optimizer_state)
    restore_schedule(resumed, state, last_epoch=5)
    rest = []
    for epoch in range(6, 12):
        rest.append(second.param_groups[0]["lr"])
        resumed.step(epoch, 50.0)
    assert rest == whole[6:]


def test_noise_comes_from_the_seed() -> None:
    flags = {"epochs": 8, "warmup_epochs": 0, "lr_noise": [0.2]}
    first, again, other = (
        rates(Config.from_flat({**flags, "seed": seed}), 1e-3, 8) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_tanh_schedule_is_the_released_one() -> None:
    config = Config.from_flat({"sched": "tanh", "epochs": 20, "min_lr": 1e-5, "warmup_lr": 1e-6})

    def expected(t: int) -> float:
        """timm 0.4.9, from its source: bounds of -6 and 4."""
        share = t / 20
        if t < 5:
            return 1e-6 + t * (expected(5) - 1e-6) / 5
        return 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 - math.tanh(-6 * (1 - share) + 4 * share))

    # Epochs 0 and 1 share a value, as with every schedule.
    curve = [expected(max(0, epoch - 1)) for epoch in range(20)]
    assert rates(config, 1e-3, 20) == pytest.approx(curve, rel=1e-9, abs=0)
    # What that version gave when it was run.
    given = {3: 0.0004002392237270174, 6: 0.0009990980593175434, 15: 0.00012801089280189645}
    assert {epoch: curve[epoch] for epoch in given} == pytest.approx(given, rel=1e-9)
    cold = rates(Config.from_flat({**config.to_flat(), "warmup_epochs": 0}), 1e-3, 3)
    assert cold == pytest.approx([1e-3, 0.9999939172671438e-3, 0.9999834655923703e-3], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fusedadamw", "CUDA required"),
        ("bnbadamw", "CUDA required"),
        ("lookahead_fusedadamw", "CUDA required"),
        ("adahessian", "needs second derivatives"),
        ("", "cannot be built"),
    ],
)
def test_optimizer_that_cannot_run_here(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        create_optimizer(nn.Linear(2, 2), Config.from_flat({"opt": name}).optim, 1e-3)


def test_unknown_optimizer_shows_the_nearest() -> None:
    config = Config.from_flat({"opt": "adamww"})
    with pytest.raises(InputError, match="adamw"):
        create_optimizer(nn.Linear(2, 2), config.optim, 1e-3)


@pytest.mark.parametrize("opt", ["adam", "adamw"])
def test_one_kernel_steps_on_cuda_alone(opt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.from_flat({"opt": opt})
    model = nn.Linear(2, 2)
    (first, *_) = create_optimizer(model, config.optim, 1e-3).param_groups
    assert not first["fused"]
    # It runs on the CPU, too, but rounds otherwise.
    monkeypatch.setattr(optim, "_is_on_cuda", lambda model: True)
    (first, *_) = create_optimizer(model, config.optim, 1e-3).param_groups
    assert first["fused"]
    create_optimizer(model, Config.from_flat({"opt": "lamb"}).optim, 1e-3)
