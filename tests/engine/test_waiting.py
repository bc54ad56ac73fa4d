"""A training step queues its work: the host never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pvt
from ecoformer.config import make_config
from ecoformer.config.schema import AugmentConfig
from ecoformer.data.pixels import collate_pictures
from ecoformer.data.transforms import build_mixup, build_train_transform
from ecoformer.engine import optim
from ecoformer.engine.folder import RunFolder
from ecoformer.engine.precision import choose_amp_dtype
from ecoformer.engine.saving import Saver
from ecoformer.engine.session import Session
from ecoformer.engine.state import TrainState
from ecoformer.engine.train import train_epoch
from ecoformer.hashing import with_random_hash_functions
from ecoformer.seeding import seeded
from ecoformer.tasks.base import Data, Network
from ecoformer.tasks.classification import Classification
from tests.engine.training import CPU, ListLoader

NUM_STEPS, SIDE = 3, 32
# What has to know values to go on, or the size of its result.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")


class Mixed(Classification):
    """Mixes batches of bytes, as a run does; without data of its own."""

    def prepare(self, batch: Any) -> Any:
        mixup = build_mixup(AugmentConfig(), num_classes=10)
        assert mixup is not None
        return mixup(*batch)


class Waits(TorchDispatchMode):
    """Notes the operations that wait, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def open_run(device: torch.device, task: type[Classification], amp_dtype: str) -> Any:
    """What ``train_epoch`` takes: a small model with hash functions, in its second epoch."""
    config = make_config(
        **{"model": "pvt_v2_b0", "attn_type": "ecoformer", "input_size": SIDE, "batch_size": 4},
        **{"amp_dtype": amp_dtype, "clip_grad": 1.0, "drop_path": 0.2, "train_mode": True},
    )
    transform = build_train_transform(AugmentConfig(reprob=1.0), input_size=SIDE)
    noise = np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8)
    with seeded(0):
        batches: list[Any] = [
            collate_pictures([(transform(Image.fromarray(noise)), k) for k in range(4)])
            for _ in range(NUM_STEPS)
        ]
        model = with_random_hash_functions(pvt.create_model("pvt_v2_b0", num_classes=10))
    loader, dtype = ListLoader(batches), choose_amp_dtype(amp_dtype, device)
    session = Session(config, task(config), Data(loader, loader), device, dtype)
    state = TrainState.create(model.to(device), config, device=device, amp_dtype=dtype)
    state.epoch = 1
    return session, state, state.model, Saver(state, config, RunFolder(session.folder))


@pytest.fixture
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser as it is on CUDA."""
    monkeypatch.setattr(optim, "_is_on_cuda", lambda model: True)


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16", "none"])
def test_no_operation_of_an_epoch_waits(amp_dtype: str) -> None:
    run = open_run(CPU, Mixed, amp_dtype)
    with Waits() as waits:
        train_epoch(*run)
    assert run[1].step == NUM_STEPS
    assert waits.found == []


def test_a_wait_would_be_seen() -> None:
    class Impatient(Mixed):
        def loss(self, network: Network, batch: Any) -> Tensor:
            loss = super().loss(network, batch)
            assert loss.item() > 0
            return loss

    with Waits() as waits:
        train_epoch(*open_run(CPU, Impatient, "bfloat16"))
    assert "_local_scalar_dense" in waits.found


@contextmanager
def refused_waits() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16", "none"])
def test_no_step_waits_for_a_gpu(amp_dtype: str) -> None:
    session, state, model, saver = open_run(torch.device("cuda"), Mixed, amp_dtype)
    # Kernels are compiled and loaded.
    train_epoch(session, state, model, saver)
    state.finish_epoch(0.0)
    with refused_waits():
        train_epoch(session, state, model, saver)
    assert state.step == NUM_STEPS


@pytest.mark.gpu
def test_batches_cross_whole_beside_what_computes() -> None:
    """Memory of a batch is used again only when what reads it is done."""
    session, *_ = open_run(torch.device("cuda"), Mixed, "none")
    busy = torch.randn(2048, 2048, device="cuda")
    images = [torch.full((64, 3, 224, 224), number, dtype=torch.uint8) for number in range(20)]
    sums = []
    for batch in images:
        moved, _ = session.move((batch.pin_memory(), 0))
        for _ in range(5):
            busy = busy @ busy / 2048
        sums.append(moved.sum(dtype=torch.int64))
        del moved
    assert [total.item() for total in sums] == [n * 64 * 3 * 224 * 224 for n in range(20)]
