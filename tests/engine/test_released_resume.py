"""Training files of the released scripts go on here, whatever order their optimiser counts in."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvt
import twins
from ecoformer.checkpoint import read_checkpoint
from ecoformer.checkpoint.layout import to_ours, to_released
from ecoformer.config import Config
from ecoformer.engine.resume import restore
from ecoformer.engine.state import TrainState, parameter_names
from ecoformer.seeding import derive_seed
from tests.backbones import load_filled
from tests.checkpoint.weights import released_shapes
from tests.engine.training import assert_equal, start_as_configured, weights

ROWS = list(released_shapes())
FAST = ["pvt_v2_b0/ecoformer", "alt_gvt_small/ecoformer"]
# A scaler that was off, and one of a GPU.
SCALERS: list[dict[str, Any]] = [
    {},
    {
        **{"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5},
        **{"growth_interval": 2000, "_growth_tracker": 7},
    },
]


def start(row: str) -> tuple[TrainState, Config]:
    model, _, attention = row.partition("/")
    family = twins.FAMILY if model in twins.FAMILY.variants else pvt.FAMILY
    config = Config.from_flat({"model": model, "attn_type": attention, "amp_dtype": "float16"})
    return start_as_configured(load_filled(family, row), config), config


def update(state: TrainState, number: int) -> None:
    """A step with gradients that follow from its number and the parameters' names."""
    for name, parameter in state.model.named_parameters():
        generator = torch.Generator().manual_seed(derive_seed("gradient", number, name))
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    state.optimizer.step()
    state.optimizer.zero_grad()


def moments(state: TrainState) -> dict[str, Tensor]:
    """What the optimiser keeps, by names of parameters."""
    parameters = dict(state.model.named_parameters())
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name in parameter_names(state)
        for key, value in state.optimizer.state[parameters[name]].items()
    }


def write_as_released(state: TrainState, row: str, scaler: Mapping[str, Any]) -> dict[str, Any]:
    """What the released script saved: by its names, in its order, and in nobody's ``step``."""
    released = to_released(state.model.state_dict())
    shapes = released_shapes()[row]
    order = [name for name in to_ours({name: released[name] for name in shapes})]
    parameters = dict(state.model.named_parameters())
    order = [name for name in order if name in parameters]
    # timm's two groups: vectors, biases and the model's own choice, then the rest.
    spared = state.model.no_weight_decay()  # type: ignore[operator]
    groups: list[list[str]] = [[], []]
    for name in order:
        is_decayed = not (parameters[name].ndim == 1 or name.endswith(".bias") or name in spared)
        groups[is_decayed].append(name)
    numbers = {name: number for number, name in enumerate(groups[0] + groups[1])}
    return {
        "model": {name: released[name].clone() for name in shapes},
        "optimizer": {
            "state": {
                number: {
                    # Earlier versions of PyTorch counted in integers.
                    key: int(value) if key == "step" else value.clone()
                    for key, value in state.optimizer.state[parameters[name]].items()
                }
                for name, number in numbers.items()
            },
            "param_groups": [
                {
                    **{"weight_decay": decay, "lr": state.learning_rate, "betas": (0.9, 0.999)},
                    **{"eps": 1e-8, "amsgrad": False},
                    **{"initial_lr": 5e-4, "params": [numbers[name] for name in group]},
                }
                for decay, group in zip((0.0, 0.05), groups, strict=True)
            ],
        },
        "lr_scheduler": {"t_initial": 300, "lr_min": 1e-5, "base_values": [5e-4, 5e-4]},
        "epoch": 3,
        "scaler": dict(scaler),
        "args": {"lr": 5e-4},
    }


@pytest.mark.parametrize(
    ("row", "scaler"),
    [
        pytest.param(row, scaler, marks=[] if row in FAST else pytest.mark.slow)
        for row, scaler in zip(ROWS, itertools.cycle(SCALERS), strict=False)
    ],
)
def test_goes_on_as_if_never_interrupted(row: str, scaler: dict[str, Any], tmp_path: Path) -> None:
    whole, config = start(row)
    whole.schedule.step(3)
    update(whole, 0)
    path = tmp_path / "checkpoint.pth"
    torch.save(write_as_released(whole, row, scaler), path)

    second, config = start(row)
    nn.init.zeros_(second.model.get_parameter("head.bias"))
    restore(second, read_checkpoint(path), config, str(path))
    assert (second.epoch, second.step) == (4, 0)
    assert second.scaler.get_scale() == (scaler.get("scale") or 65536.0)
    assert_equal(moments(second), moments(whole))
    for state in (whole, second):
        update(state, 1)
    assert second.learning_rate == whole.learning_rate
    assert_equal(weights(second.model), weights(whole.model))
    assert_equal(moments(second), moments(whole))


def test_an_older_order_of_our_own_goes_on() -> None:
    """Without names in the file, its weights tell the order of the optimiser's numbers."""

    class Swapped(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(3, 3))

    def begin(names: str) -> tuple[TrainState, Config]:
        config = Config.from_flat({"model": "any"})
        return start_as_configured(Swapped(names), config), config

    first, config = begin("abc")
    update(first, 0)
    older = deepcopy(first.to_checkpoint(config))
    for name in ("data", "optimizer_names", "num_optimizer_states"):
        del older[name]
    second, config = begin("cab")
    restore(second, older, config, "older.pth")
    for state in (first, second):
        update(state, 1)
    assert_equal(dict(sorted(moments(second).items())), dict(sorted(moments(first).items())))
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
