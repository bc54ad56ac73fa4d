"""``--compile``: how often a run compiles, with a compiler that only counts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ecoformer.engine.command import run_command
from ecoformer.engine.logs import read_log
from pvt import FAMILY
from tests.engine.conftest import NUM_VAL


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """What ``torch.compile`` hands graphs to."""
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


def test_a_run_compiles_once_to_train_and_once_to_evaluate(
    tiny_flags: list[str],
    tmp_path: Path,
    counter: CompileCounter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The last batch of an evaluation is smaller, and not of one image.
    assert NUM_VAL % 8 > 1
    assert run_command([*tiny_flags, "--epochs", "2", "--compile"], FAMILY) == 0
    assert counter.frame_count == 2

    torch.compiler.reset()
    assert run_command([*tiny_flags, "--eval", "--compile"], FAMILY) == 0
    assert counter.frame_count == 3
    last = read_log(tmp_path / "run")[-1]
    assert f"top-1 {last['test_acc1']:.2f} %" in capsys.readouterr().out.splitlines()[-1]
