"""Thirty training steps of the released code, loss by loss, through our own loop."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ecoformer.checkpoint import load_checkpoint
from ecoformer.checkpoint.layout import to_ours
from ecoformer.config import make_config
from ecoformer.engine import train as loop
from ecoformer.engine.folder import RunFolder
from ecoformer.engine.saving import Saver
from ecoformer.engine.session import Session
from ecoformer.engine.state import TrainState
from ecoformer.engine.train import train_epoch
from ecoformer.tasks.base import Data, Network
from ecoformer.tasks.classification import Classification
from tests.engine.training import CPU
from tests.golden.fill import fill

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "training_steps.json").read_text())
NUM_EPOCHS, NUM_STEPS, BATCH_SIZE, NUM_CLASSES = 3, 10, 8, 10


class Batches:
    """The images [8, 3, 96, 96] and soft targets [8, 10] of each step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.epoch = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return NUM_STEPS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(NUM_STEPS * self.epoch, NUM_STEPS * (self.epoch + 1)):
            random = np.random.RandomState(1000 + step)
            pixels = random.standard_normal((BATCH_SIZE, 3, 96, 96)).astype(np.float32)
            t = (2 * random.standard_normal((BATCH_SIZE, NUM_CLASSES))).astype(np.float32)
            power = np.exp(t - t.max(1, keepdims=True))
            targets = power / power.sum(1, keepdims=True)
            yield torch.from_numpy(pixels).to(self.dtype), torch.from_numpy(targets).to(self.dtype)


class Recorded(Classification):
    """Keeps the losses."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.losses: list[float] = []

    def loss(self, network: Network, batch: Any) -> Tensor:
        loss = super().loss(network, batch)
        self.losses.append(loss.item())
        return loss


def build(row: str) -> nn.Module:
    """The model with golden weights, and the golden hash functions where it has some."""
    variant, attention = row.split("/")
    package = "pvt" if variant.startswith("pvt") else "twins"
    model: nn.Module = importlib.import_module(package).create_model(
        variant, attention, num_classes=NUM_CLASSES
    )
    state = {n: torch.from_numpy(fill(n, tuple(p.shape))) for n, p in model.named_parameters()}
    if attention == "ecoformer":
        with np.load(GOLDEN / "training_steps_hash.npz") as file:
            state |= {name: torch.from_numpy(file[name]) for name in file}
    load_checkpoint(model, to_ours(state), strict=True)
    return model


def take_steps(row: str, dtype: torch.dtype) -> tuple[TrainState, list[float], list[float]]:
    """Train; returns the state, the losses of the steps and the rates of the epochs."""
    variant, attention = row.split("/")
    config = make_config(
        **{"model": variant, "attn_type": attention, "batch_size": BATCH_SIZE, "lr": 0.064},
        **{"epochs": NUM_EPOCHS, "warmup_epochs": 2, "warmup_lr": 1e-5, "min_lr": 1e-5},
        **{"weight_decay": 0.05, "clip_grad": ROWS[row]["clip_grad"], "train_mode": False},
    )
    task, batches = Recorded(config), Batches(dtype)
    session = Session(config, task, Data(batches, batches), CPU, torch.float32)
    model = build(row).to(dtype)
    state = TrainState.create(model, config, device=CPU, amp_dtype=torch.float32)
    rates = []
    for _ in range(NUM_EPOCHS):
        rates.append(state.learning_rate)
        train_epoch(session, state, model, Saver(state, config, RunFolder(session.folder)))
        state.finish_epoch(0.0)
    return state, task.losses, rates


# Of three minutes the half minute that looks at codes, clipping and both precisions.
FAST = {("pvt_v2_b0/ecoformer", "float64"), ("pvt_v2_b0/msa_share_qk", "float32")}
CASES = [
    pytest.param(row, dtype, marks=[] if (row, dtype) in FAST else pytest.mark.slow)
    for row in ROWS
    for dtype in ("float64", "float32")
    if f"losses_{dtype}" in ROWS[row]
]


@pytest.mark.parametrize(("row", "dtype"), CASES)
def test_losses_weights_and_rates(row: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hash functions are those of the file throughout.
    monkeypatch.setattr(loop, "_refit", lambda *_, **__: None)
    state, losses, rates = take_steps(row, getattr(torch, dtype))
    golden = ROWS[row]
    assert rates == pytest.approx(golden["learning_rates"], rel=1e-12)
    groups = [[len(g["params"]), g["weight_decay"]] for g in state.optimizer.param_groups]
    assert groups == golden["groups"]

    tolerance = key_tolerance = 1e-12
    if dtype == "float32":
        # Rounding flips a few codes. It is also all that the bias of softmax keys has for a
        # gradient, and Adam makes steps of full length of it.
        tolerance, key_tolerance = 1e-3 if row.endswith("ecoformer") else 3e-5, 1e-3
    assert losses == pytest.approx(golden[f"losses_{dtype}"], rel=tolerance, abs=0)
    norms = golden[f"weights_l2_{dtype}"]
    assert dict(state.model.named_parameters()).keys() == norms.keys()
    for name, parameter in state.model.named_parameters():
        rel = key_tolerance if name.endswith("attn.qkv.bias") else tolerance
        assert parameter.double().norm().item() == pytest.approx(norms[name], rel=rel), name
