from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from ecoformer.__main__ import main as open_door
from ecoformer.engine.command import run_command
from ecoformer.hashing import fit
from ecoformer.threads import call_within, one_thread

SPINS, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {SPINS: "3000"}),
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


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# The first stage's tokens of images of 64 px, the third one's of 224 px.
@pytest.mark.parametrize(
    ("num_heads", "num_tokens", "expected"), [(1, 256, 1), (5, 196, 2)], ids=["small", "large"]
)
def test_a_small_fit_takes_one_thread_and_gives_the_others_back(
    num_heads: int,
    num_tokens: int,
    expected: int,
    two_threads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, found = fit._fit_bits, []

    def fit_bits(*arguments: Any) -> Any:
        found.append(torch.get_num_threads())
        return real(*arguments)

    monkeypatch.setattr(fit, "_fit_bits", fit_bits)
    x = normalize(torch.randn(8, num_heads, num_tokens, 32), dim=-1)
    weight = torch.randn(num_heads, 1, 25)
    fit.fit_hash(x, anchors=x[0, :, :25], weight=weight, num_steps=1)
    assert found == [expected]
    assert torch.get_num_threads() == 2


def test_threads_come_back_after_an_error(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError), one_thread(if_small=True):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


def test_a_call_that_never_returns_is_left() -> None:
    assert call_within(10.0, lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError):
        call_within(10.0, lambda: 1 / 0)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer in 0 s"):
        call_within(0.05, lambda: time.sleep(30))
    assert time.monotonic() - began < 20
