"""Fitting a whole model: order, draws, modes, and what a failure leaves behind."""

from __future__ import annotations

import copy
import logging
from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecoformer import HashConfig, InputError, NonFiniteError, fit_hash_functions
from ecoformer.hashing import hash_layers, with_random_hash_functions
from ecoformer.ops import normalize_rows
from tests.tiny import TINY_HASH, TinyModel, draw_images

FIRST, SECOND = "blocks.0.attn.hash", "blocks.1.attn.hash"


def fit(
    model: nn.Module | None = None, images: Tensor | None = None, *, seed: int = 0
) -> nn.Module:
    """Fit a model in eval mode, a fresh one if none is given, with a seeded generator."""
    model = TinyModel().eval() if model is None else model
    generator = torch.Generator().manual_seed(seed)
    fit_hash_functions(model, draw_images() if images is None else images, generator)
    return model


def hash_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all hash buffers by name."""
    state = model.state_dict().items()
    return {name: tensor.clone() for name, tensor in state if ".hash." in name}


def is_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def rows_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """Unit rows that reach a layer of a fitted model: [B, H, N, D]."""
    rows = []
    layer = hash_layers(model)[name]
    handle = layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return normalize_rows(rows[0])


def find_tokens(anchors: Tensor, rows: Tensor) -> list[list[int]]:
    """For each head, where its anchors stand among the tokens of all images, image by image."""
    tokens = rows.transpose(0, 1).flatten(1, 2)  # [H, B * N, D]
    is_equal = (anchors[:, :, None] == tokens[:, None]).all(-1)  # [H, M, B * N]
    assert (is_equal.sum(-1) == 1).all()
    return is_equal.int().argmax(-1).tolist()


def test_a_fitted_model_runs() -> None:
    model = fit()
    assert model(draw_images(3)).isfinite().all()
    assert all(layer.is_fitted for layer in hash_layers(model).values())


def test_the_report_holds_what_was_learned() -> None:
    model = TinyModel().eval()
    fits = fit_hash_functions(model, draw_images())
    assert list(fits) == [FIRST, SECOND]
    for name, layer in hash_layers(model).items():
        assert torch.equal(fits[name].weight, layer.weight)
        assert torch.equal(fits[name].kernel_mean, layer.kernel_mean)


def test_one_seed_gives_one_fit() -> None:
    assert is_same(hash_state(fit(seed=1)), hash_state(fit(seed=1)))
    assert not is_same(hash_state(fit(seed=1)), hash_state(fit(seed=2)))


def test_draws_come_from_the_generator_alone() -> None:
    model = TinyModel().eval()
    before = torch.get_rng_state()
    fit(model)
    assert torch.equal(before, torch.get_rng_state())


def test_later_layers_are_fitted_on_hashed_inputs() -> None:
    model, images = fit(), draw_images()
    # Its anchors are rows of the second layer of the finished model, to the bit.
    find_tokens(hash_layers(model)[SECOND].anchors, rows_of(model, SECOND, images))


def test_anchors_are_tokens_of_the_first_image() -> None:
    model, images = fit(), draw_images()  # 24 tokens an image
    places = find_tokens(hash_layers(model)[FIRST].anchors, rows_of(model, FIRST, images))
    assert places[0] == places[1]
    assert len(set(places[0])) == TINY_HASH.num_anchors
    assert max(places[0]) < 24


def test_anchors_come_from_as_many_images_as_hold_enough() -> None:
    images = draw_images(5, 8, 8)  # 4 tokens an image, 6 anchors
    seen = set()
    for seed in range(8):
        model = fit(images=images, seed=seed)
        places = find_tokens(hash_layers(model)[FIRST].anchors, rows_of(model, FIRST, images))
        assert places[0] == places[1]
        seen |= set(places[0])
    assert seen == set(range(8))


def test_too_few_tokens_are_an_error() -> None:
    message = rf"{FIRST}: 1 images of 4 tokens are fewer than the 6 anchors; .* at least 2 images"
    with pytest.raises(InputError, match=message):
        fit(images=draw_images(1, 8, 8))


def test_fewer_tokens_than_pairs_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ecoformer"):
        fit(images=draw_images(2, 8, 8))
        (message,) = (record.getMessage() for record in caplog.records)
        assert FIRST in message
        assert SECOND in message


def test_a_refit_starts_from_the_present_rows_with_new_anchors() -> None:
    model = fit()
    before = hash_state(model)
    fits = fit_hash_functions(model, draw_images(), torch.Generator().manual_seed(1))
    after = hash_state(model)
    for name, report in fits.items():
        moved = (after[f"{name}.weight"] - before[f"{name}.weight"]).abs().amax((0, 2))  # [K]
        # Ten steps move a row by far less than a fresh draw would.
        assert moved.max() < 0.05
        assert (moved[~report.is_changed] == 0).all()
        assert not torch.equal(after[f"{name}.anchors"], before[f"{name}.anchors"])


def test_autocast_is_off_inside_the_fit() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = hash_state(fit())
    assert is_same(inside, hash_state(fit()))


@pytest.mark.parametrize("is_training", [False, True])
def test_the_mode_stays_and_is_that_of_the_fit(is_training: bool) -> None:
    model = TinyModel().train(is_training)
    modes = []
    layer = model.get_submodule("blocks.1.attn")
    layer.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    fit(model)
    assert modes == [is_training]
    assert all(module.training == is_training for module in model.modules())


def test_evaluation_changes_nothing() -> None:
    model = fit()
    before = copy.deepcopy(model.state_dict())
    for images in (draw_images(3, seed=1), draw_images(1, 8, 8)):
        with torch.no_grad():
            model(images)
    assert is_same(before, model.state_dict())


def test_fit_leaves_parameters_and_gradients_alone() -> None:
    model = TinyModel()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter)
        assert parameter.grad is None and parameter.requires_grad


class Normed(nn.Module):
    """A model with BatchNorm before it, and a table that grows with the images."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.body = TinyModel()
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        self.table = images.new_ones(images.shape[-1])
        out: Tensor = self.body(self.norm(images) * self.table)
        return out


@pytest.mark.parametrize("is_failure", [False, True])
def test_a_fit_in_train_mode_moves_no_running_statistics(is_failure: bool) -> None:
    model = Normed().train()
    model.norm(draw_images())
    before = copy.deepcopy(model.norm.state_dict())
    assert before["num_batches_tracked"] == 1
    if is_failure:
        for parameter in model.body.blocks[1].parameters():
            nn.init.constant_(parameter, float("nan"))
        with pytest.raises(NonFiniteError):
            fit(model)
    else:
        fit(model)
    assert is_same(before, model.norm.state_dict())
    assert model.table.shape == (24,)


def test_a_failure_names_the_layer_and_leaves_no_hook() -> None:
    model = TinyModel().eval()
    weight = model.get_submodule("blocks.1.attn.to_qk").weight
    assert isinstance(weight, Tensor)
    healthy = weight.detach().clone()
    nn.init.constant_(weight, float("nan"))
    with pytest.raises(NonFiniteError, match=rf"^{SECOND}: .* not finite"):
        fit(model)
    with torch.no_grad():
        weight.copy_(healthy)
    # With a hook left behind this forward would fit.
    with pytest.raises(InputError, match="not fitted"):
        model(draw_images())


def test_success_leaves_no_hook() -> None:
    model = fit()
    before = hash_state(model)
    model(draw_images(seed=5))
    assert is_same(before, hash_state(model))


def test_a_model_without_hash_functions_has_nothing_to_fit() -> None:
    with pytest.raises(InputError, match="no EcoFormer layer"):
        fit_hash_functions(nn.Linear(2, 2), torch.ones(1, 2))


class Detector(nn.Module):
    """Takes images in any of the ways that models do, and runs its backbone on them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyModel()

    def forward(self, images: Tensor | list[Tensor], scale: float = 1.0) -> Tensor:
        if isinstance(images, list):
            images = torch.stack(images)
        return self.backbone(scale * images)


Pair = namedtuple("Pair", ["images", "scale"])

INPUTS: dict[str, Any] = {
    "a tensor": draw_images(),
    "a tuple of one": (draw_images(),),
    "a tuple": (2 * draw_images(), 0.5),
    "a named tuple": Pair(2 * draw_images(), 0.5),
    "a list of images": list(draw_images()),
    "a dict": {"images": 2 * draw_images(), "scale": 0.5},
    "a mapping": UserDict(images=draw_images()),
    "a function": lambda model: model(draw_images()),
    "a function that runs a part": lambda model: model.backbone(draw_images()),
    "a function that runs twice": lambda model: [model(draw_images()) for _ in range(2)],
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_inputs_are_what_the_model_takes(inputs: Any) -> None:
    detector = Detector().eval()
    fits = fit_hash_functions(detector, inputs, torch.Generator().manual_seed(0))
    assert list(fits) == [f"backbone.{FIRST}", f"backbone.{SECOND}"]
    assert is_same(hash_state(detector.backbone), hash_state(fit()))


def test_a_shared_layer_is_fitted_at_its_first_use() -> None:
    model = TinyModel().eval()
    model.blocks[1] = model.blocks[0]
    images = draw_images()
    fits = fit_hash_functions(model, images)
    assert list(fits) == [FIRST]
    find_tokens(hash_layers(model)[FIRST].anchors, rows_of(model, FIRST, images))


def test_inputs_that_reach_no_layer_are_an_error() -> None:
    model = TinyModel().eval()
    with pytest.raises(InputError, match="reach no EcoFormer layer"):
        fit_hash_functions(model, lambda model: None)


def test_nothing_is_fitted_in_a_forward() -> None:
    for model in (TinyModel().train(), TinyModel().eval()):
        before = hash_state(model)
        with pytest.raises(InputError, match="fit_hash_functions"):
            model(draw_images())
        assert is_same(before, hash_state(model))


def test_random_functions_are_put_on_a_copy() -> None:
    model = TinyModel().eval()
    before = copy.deepcopy(model.state_dict())
    runnable = with_random_hash_functions(model, seed=1)
    assert runnable(draw_images()).isfinite().all()
    assert is_same(before, model.state_dict())
    assert is_same(hash_state(runnable), hash_state(with_random_hash_functions(model, seed=1)))


def test_random_functions_replace_no_fitted_ones() -> None:
    model = fit()
    assert is_same(hash_state(with_random_hash_functions(model)), hash_state(model))


def test_each_layer_is_fitted_by_its_own_settings() -> None:
    model = TinyModel().eval()
    other = TinyModel(HashConfig(num_bits=3, num_anchors=4, num_similar=2, num_fit_steps=1))
    model.blocks[1] = other.blocks[0]
    fit(model.eval())
    assert hash_layers(model)[SECOND].weight.shape == (2, 3, 4)
