from __future__ import annotations

import os
from pathlib import Path

import pytest

from ecoformer.__main__ import main as open_door
from ecoformer.engine.command import run_command

SPINS, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {SPINS: "10000"}),
        ({SPINS: "7"}, {SPINS: "7"}),
        ({POLICY: "ACTIVE"}, {POLICY: "ACTIVE"}),
    ],
)
@pytest.mark.parametrize("is_door", [True, False])
def test_commands_limit_how_long_threads_spin(
    given: dict[str, str],
    expected: dict[str, str],
    is_door: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in (SPINS, POLICY):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    words = ["--model", "pvt_v2_b0", "--data-set", "DIGITS", "--output-dir", str(tmp_path)]
    # There is no checkpoint to evaluate.
    assert (open_door(["eval", *words]) if is_door else run_command(["--eval", *words])) == 2
    found = {name: os.environ.pop(name) for name in (SPINS, POLICY) if name in os.environ}
    assert found == expected
