"""One epoch: what a step computes, when it fits, and when it stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvt
from ecoformer.engine.launch import process_group
from ecoformer.errors import NonFiniteError
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import fit_hash_functions, hash_layers
from ecoformer.ranks import rank
from ecoformer.seeding import derive_seed
from tests.engine.ranks import run_ranks
from tests.engine.training import Classifier, assert_equal, make_batches, start, train, weights


def tiny_ecoformer() -> nn.Module:
    torch.manual_seed(0)
    hashing = HashConfig(num_bits=4, num_anchors=8, num_fit_steps=2)
    return pvt.create_model("pvt_v2_b0", num_classes=2, hashing=hashing, drop_path_rate=0.3)


def test_accumulated_batches_equal_a_big_one() -> None:
    # The last group has one batch of the three.
    small = make_batches(7, 4)
    big = [
        tuple(torch.cat(parts) for parts in zip(*small[i : i + 3], strict=True)) for i in (0, 3, 6)
    ]
    first, second = Classifier(), Classifier()
    train(*start(first, grad_accum_steps=3), small)
    train(*start(second), big)  # type: ignore[arg-type]
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(first.head.weight, Classifier().head.weight)


def test_clipping_bounds_the_update() -> None:
    before, model = Classifier(), Classifier()
    train(*start(model, clip_grad=1e-3), make_batches(1, 8))
    moved = [a - b for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    norm = torch.cat([move.flatten() for move in moved]).norm().item()
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_the_cpu(amp_dtype: str) -> None:
    plain, mixed = Classifier(), Classifier()
    batches = make_batches(3, 8)
    train(*start(plain), batches)
    state, config = start(mixed, amp_dtype=amp_dtype)
    assert state.scaler.is_enabled() == (amp_dtype == "float16")
    train(state, config, batches)
    assert not torch.equal(mixed.head.weight, plain.head.weight)
    torch.testing.assert_close(mixed.head.weight, plain.head.weight, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_mixed_precision_through_ecoformer(amp_dtype: str) -> None:
    model = tiny_ecoformer()
    before = weights(model)
    state, config = start(model, amp_dtype=amp_dtype, opt="adamw")
    train(state, config, make_batches(2, 8))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert any(not torch.equal(before[k], v) for k, v in model.named_parameters())


def test_overflow_in_float16_only_lowers_the_scale() -> None:
    class Steep(Classifier):
        """Gradients pass 65504 as soon as they are scaled, the loss stays small."""

        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits + (1e3 * logits - (1e3 * logits).detach())

    model = Steep()
    before = weights(model)
    state, config = start(model, amp_dtype="float16")
    train(state, config, make_batches(1, 8))
    assert state.scaler.get_scale() == 2.0**15
    assert_equal(before, weights(model))


class Poisoned(Classifier):
    """The loss or a gradient is not finite at one step of one rank."""

    def __init__(self, at: int, kind: str, on_rank: int = 0) -> None:
        super().__init__()
        self.at, self.kind, self.on_rank = at, kind, on_rank
        self.count = -1

    def forward(self, images: Tensor) -> Tensor:
        self.count += 1
        logits = super().forward(images)
        if self.count == self.at and rank() == self.on_rank:
            if self.kind == "loss":
                return logits * float("nan")
            logits.register_hook(lambda gradient: gradient * float("inf"))
        return logits


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("at", [1, 3])
def test_stops_where_it_is_not_finite(kind: str, at: int) -> None:
    state, config = start(Poisoned(at, kind))
    with pytest.raises(NonFiniteError, match=rf"epoch 0, step {at}, learning rate 0.1, loss scale"):
        train(state, config, make_batches(4, 8))


def test_stops_when_the_scale_runs_out() -> None:
    class NoGradient(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            logits.register_hook(lambda gradient: gradient * float("nan"))
            return logits

    state, config = start(NoGradient(), amp_dtype="float16")
    with pytest.raises(NonFiniteError, match="loss scale"):
        train(state, config, make_batches(60, 2))


def _poison_rank_1(kind: str) -> str:
    with process_group("cpu"):
        try:
            train(*start(Poisoned(1, kind, on_rank=1)), make_batches(4, 8, seed=rank()))
        except NonFiniteError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_all_ranks_stop_at_one_step(kind: str) -> None:
    messages = run_ranks(_poison_rank_1, 2, kind)
    assert messages[0] == messages[1]
    assert "epoch 0, step 1" in messages[0]


@pytest.mark.parametrize("is_train_mode", [True, False])
def test_fits_once_on_the_first_batch_in_the_mode_of_the_run(is_train_mode: bool) -> None:
    batches = make_batches(2, 8)
    state, config = start(tiny_ecoformer(), train_mode=is_train_mode, refit_every_epochs=2)
    # As the loop does it: the step's seed, then the fit.
    expected = tiny_ecoformer().train(is_train_mode)
    torch.manual_seed(derive_seed("step", 0, 0, 0, 0))
    fit_hash_functions(
        expected, batches[0][0], torch.Generator().manual_seed(derive_seed("fit", 0, 0))
    )
    train(state, config, batches)
    fitted = buffers(state.model)
    assert_equal(fitted, buffers(expected))

    state.finish_epoch(0.0)
    train(state, config, batches)
    assert_equal(buffers(state.model), fitted)

    state.finish_epoch(0.0)
    train(state, config, batches)
    assert not torch.equal(
        buffers(state.model)["block1.0.attn.hash.anchors"], fitted["block1.0.attn.hash.anchors"]
    )


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, layer in hash_layers(model).items()
        for key, value in layer.named_buffers()
    }


def test_the_rest_of_an_epoch_equals_the_whole() -> None:
    batches = make_batches(6, 8)
    fields: dict[str, Any] = {"train_mode": True, "opt": "adamw", "grad_accum_steps": 2}
    whole, config = start(Classifier(drop_rate=0.5), **fields)
    train(whole, config, batches)

    half, config = start(Classifier(drop_rate=0.5), **fields)
    train(half, config, batches[:4])
    assert half.step == 4
    train(half, config, batches)
    assert half.step == 6
    assert_equal(weights(half.model), weights(whole.model))
    assert half.loss.sums() == whole.loss.sums()


def test_generators_before_an_epoch_do_not_matter() -> None:
    batches = make_batches(2, 8)
    runs = []
    for seed in (1, 2):
        state, config = start(Classifier(drop_rate=0.5), train_mode=True)
        torch.manual_seed(seed)
        train(state, config, batches)
        runs.append(weights(state.model))
    assert_equal(*runs)


def _three_steps() -> tuple[dict[str, Tensor], list[int]]:
    with process_group("cpu"):
        torch.manual_seed(rank())
        model = tiny_ecoformer()
        state, config = start(model, opt="adamw", train_mode=True)
        train(state, config, make_batches(3, 8, seed=rank()))
        return weights(model), state.loss.sums()


def test_two_ranks_stay_equal() -> None:
    (first, first_sums), (second, second_sums) = run_ranks(_three_steps, 2)
    assert_equal(first, second)
    assert first_sums == second_sums
    assert first_sums[1] == 6
    assert any("hash.weight" in name for name in first)


def _two_halves() -> dict[str, Tensor]:
    with process_group("cpu"):
        model = Classifier()
        images, labels = make_batches(1, 8)[0]
        half = slice(rank() * 4, rank() * 4 + 4)
        # Two ranks double the peak rate; the single process has 0.1.
        train(*start(model, lr=0.05 * 512 / 32), [(images[half], labels[half])])
        return weights(model)


def test_two_ranks_equal_one_of_twice_the_batch() -> None:
    alone = Classifier()
    train(*start(alone), make_batches(1, 8))
    for found in run_ranks(_two_halves, 2):
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
