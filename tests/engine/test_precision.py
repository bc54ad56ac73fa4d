"""Which arithmetic a run takes, and that float32 is left alone."""

from __future__ import annotations

import pytest
import torch

from ecoformer.engine.precision import autocast, choose_amp_dtype, create_scaler
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
