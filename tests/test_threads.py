from __future__ import annotations

import os
from pathlib import Path

import pytest

from ecoformer.__main__ import main as open_door
from ecoformer.engine.command import run_command


@pytest.mark.parametrize("given", [None, "ACTIVE"])
@pytest.mark.parametrize("is_door", [True, False])
def test_commands_let_threads_wait_passively(
    given: str | None, is_door: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    words = ["--model", "pvt_v2_b0", "--data-set", "DIGITS", "--output-dir", str(tmp_path)]
    # There is no checkpoint to evaluate.
    assert (open_door(["eval", *words]) if is_door else run_command(["--eval", *words])) == 2
    assert os.environ.pop("OMP_WAIT_POLICY") == (given or "PASSIVE")
