"""Which arithmetic a run takes, and that float32 is left alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch._inductor.config

from ecoformer.engine.precision import (
    autocast,
    choose_amp_dtype,
    create_scaler,
    settled_arithmetic,
)
from ecoformer.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_default_follows_the_device() -> None:
    assert choose_amp_dtype(None, CUDA) is torch.float16
    assert choose_amp_dtype(None, CPU) is torch.float32


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_named_type_beats_the_device(device: torch.device) -> None:
    assert choose_amp_dtype("bfloat16", device) is torch.bfloat16
    assert choose_amp_dtype("none", device) is torch.float32
    with pytest.raises(InputError, match="--amp-dtype is float16, bfloat16 or none, not 'int8'"):
        choose_amp_dtype("int8", device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products_are_of_the_type_and_only_float16_is_scaled(dtype: torch.dtype) -> None:
    x = torch.ones(2, 2)
    with autocast(CPU, dtype):
        assert (x @ x).dtype is dtype
    assert create_scaler(CPU, dtype).is_enabled() == (dtype is torch.float16)


def arithmetic() -> dict[str, object]:
    """How PyTorch would compute on CUDA."""
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    return {
        "products": torch.get_float32_matmul_precision(),
        # Raises where the newer settings contradict it.
        "tf32": (torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32),
        "benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic,
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "fill": memory.fill_uninitialized_memory,
        "compiler": torch._inductor.config.deterministic,
    }


def test_arithmetic_is_settled_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.set_float32_matmul_precision("high")
    before = arithmetic()
    # What explicit settings are for.
    assert before["tf32"] == (True, True)
    exact = before | {"products": "highest", "tf32": (False, False), "benchmark": False}
    try:
        with settled_arithmetic(is_deterministic=False):
            assert arithmetic() == exact
        assert arithmetic() == before
        with settled_arithmetic(is_deterministic=False, has_tf32=True):
            assert arithmetic() == exact | {"tf32": (False, True)}
        with pytest.raises(KeyError), settled_arithmetic(is_deterministic=True):
            assert arithmetic() == exact | {
                "deterministic": True,
                "algorithms": True,
                "fill": False,
                "compiler": True,
            }
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            raise KeyError
        assert arithmetic() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_newer_settings_of_a_caller_come_back() -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.conv.fp32_precision = "ieee"
    try:
        with settled_arithmetic(is_deterministic=False):
            assert cudnn.allow_tf32 is False
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")
    finally:
        cudnn.allow_tf32 = True
