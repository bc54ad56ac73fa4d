"""Hash functions in averages of weights: over time, and over checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ecoformer import InputError, fit_hash_functions, load_checkpoint
from tests.tiny import TinyModel, draw_images

IMAGES = draw_images()


class Ema(nn.Module):
    """PyTorch's average of the buffers, too, under the names of timm's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        average = get_ema_multi_avg_fn(0.9)
        self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)

    @property
    def module(self) -> nn.Module:
        return self.average.module

    def update(self, model: nn.Module) -> None:
        self.average.update_parameters(model)


class Swa(Ema):
    """PyTorch's, which copies buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.average = AveragedModel(model)


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "timm": lambda model: ModelEmaV3(model, decay=0.9),
    "timm, slow": lambda model: ModelEmaV3(model, decay=0.9999),
    "timm, one by one": lambda model: ModelEmaV3(model, decay=0.9, foreach=False),
    "timm, buffers copied": lambda model: ModelEmaV3(model, decay=0.9, exclude_buffers=True),
    "timm, second version": lambda model: ModelEmaV2(model, decay=0.9),
    "PyTorch": Swa,
    "PyTorch, buffers averaged": Ema,
}


def step(model: nn.Module) -> None:
    """Change the weights, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def functions_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if ".hash." in name}


def fit(model: nn.Module, seed: int = 0) -> None:
    fit_hash_functions(model, draw_images(seed=seed), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("is_asked_early", [False, True])
def test_a_moving_average_follows_every_fit(
    average: Callable[[nn.Module], Any], is_asked_early: bool
) -> None:
    torch.manual_seed(0)
    model = TinyModel().eval()
    ema = average(model)
    for _ in range(2):
        ema.update(model)
    with pytest.raises(InputError, match="not fitted"):
        ema.module(IMAGES)
    for seed in range(3):
        fit(model, seed)
        for _ in range(5):
            step(model)
            ema.update(model)
            if is_asked_early:
                ema.module(IMAGES)
        torch.testing.assert_close(functions_of(ema.module), functions_of(model), rtol=0, atol=0)
        with torch.inference_mode():
            logits = ema.module(IMAGES)
        assert logits.isfinite().all()
    assert not torch.equal(ema.module.state_dict()["head.weight"], model.head.weight)
    # It can be sent to another process, and outlives its original.
    del model
    buffer = io.BytesIO()
    torch.save(ema.module, buffer)
    again = pickle.loads(pickle.dumps(ema.module))
    assert torch.equal(again(IMAGES), logits)
    assert torch.equal(copy.deepcopy(ema.module)(IMAGES), logits)


def test_a_copy_that_nobody_averages_stays_as_it_is() -> None:
    model = TinyModel().eval()
    fit(model)
    twin = copy.deepcopy(model)
    before = copy.deepcopy(functions_of(twin))
    fit(model, seed=1)
    moved = copy.deepcopy(twin).double().float()
    for same in (twin, moved):
        same(IMAGES)
        torch.testing.assert_close(functions_of(same), before, rtol=0, atol=0)
    # Loaded and broadcast functions are its own.
    other = TinyModel().eval()
    fit(other, seed=2)
    twin.load_state_dict(other.state_dict())
    moved_buffers = dict(moved.named_buffers())
    for name, buffer in other.named_buffers():
        moved_buffers[name].copy_(buffer)
    for same in (twin, moved):
        same(IMAGES)
        torch.testing.assert_close(functions_of(same), functions_of(other), rtol=0, atol=0)


def average_checkpoints(*models: nn.Module) -> dict[str, Tensor]:
    """What timm's script of this name writes: a mean in float64, saved as float32."""
    states = [model.state_dict() for model in models]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).float()
        for name in states[0]
    }


def load_plainly(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state)


def load_by_name(model: nn.Module, state: dict[str, Tensor]) -> None:
    load_checkpoint(model, state, strict=True)


each_way = pytest.mark.parametrize("load", [load_plainly, load_by_name])
Load = Callable[[nn.Module, dict[str, Tensor]], None]


@each_way
@pytest.mark.parametrize("is_fitted", [False, True])
def test_checkpoints_of_one_fit_are_averaged(load: Load, is_fitted: bool) -> None:
    model = TinyModel().eval()
    if is_fitted:
        fit(model)
    later = [copy.deepcopy(model) for _ in range(3)]
    for other in later:
        step(other)
    averaged = TinyModel(seed=1).eval()
    load(averaged, average_checkpoints(*later))
    torch.testing.assert_close(functions_of(averaged), functions_of(model), rtol=0, atol=0)
    weights = torch.stack([other.head.weight for other in later]).mean(0)
    torch.testing.assert_close(averaged.head.weight, weights)
    if is_fitted:
        assert averaged(IMAGES).isfinite().all()
        # Half a file's precision is no other fit.
        halves = {name: tensor.half() for name, tensor in average_checkpoints(*later).items()}
        load(averaged, halves)


@each_way
def test_fitted_and_unfitted_ones_are_not(load: Load) -> None:
    model = TinyModel()
    fitted = copy.deepcopy(model)
    fit(fitted)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.hash: .*averaged with unfitted"):
        load(TinyModel(), average_checkpoints(model, fitted))


@each_way
def test_different_fits_are_not(load: Load) -> None:
    models = [TinyModel(), TinyModel()]
    for seed, model in enumerate(models):
        fit(model, seed)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.hash: .*different fits.*between two"):
        load(TinyModel(), average_checkpoints(*models))


@pytest.mark.parametrize("flag", [torch.ones(2), torch.tensor(float("nan"))])
def test_other_flags_are_refused_too(flag: Tensor) -> None:
    model = TinyModel()
    state = {**model.state_dict(), "blocks.0.attn.hash.is_fitted": flag}
    with pytest.raises(InputError):
        load_checkpoint(model, state)
