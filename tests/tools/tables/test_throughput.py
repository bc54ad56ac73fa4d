"""Timing the main table: within its budget, in pairs, and never the same twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ecoformer.errors import InputError
from ecoformer.tools.tables import throughput
from ecoformer.tools.tables.throughput import Timed, time_models

SIZES = {
    "pvt_v2_b0/msa": 32,
    "pvt_v2_b0/ecoformer": 32,
    "alt_gvt_small/msa": 32,
    "alt_gvt_small/ecoformer": 32,
}
CPU = torch.device("cpu")
HOW = Timed(1, CPU, "a test", minutes=60)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows that were timed, which takes no time: softmax 2 images/s, EcoFormer 3."""
    names: list[str] = []

    def note(pair: list[str], side: int, how: Timed, seconds: float) -> dict:
        names.extend(pair)
        return {name: {"images_per_s": 2.0 + name.endswith("ecoformer")} for name in pair}

    monkeypatch.setattr(throughput, "_time_in_turns", note)
    return names


def test_a_pair_takes_turns_and_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "_MAX_ROUNDS", throughput._MIN_ROUNDS)
    pair = {name: side for name, side in SIZES.items() if name.startswith("pvt")}
    softmax, ecoformer = time_models(pair, HOW, tmp_path / "t.csv").values()
    for row in (softmax, ecoformer):
        low, rate, high = (row[f"images_per_s{suffix}"] for suffix in ("_low", "", "_high"))
        assert 0 < float(low or 0) <= float(rate or 0) <= float(high or 0)
        assert int(row["num_batches"] or 0) >= 5
    ratio = float(ecoformer["images_per_s"] or 0) / float(softmax["images_per_s"] or 1)
    assert ecoformer["speedup"] == pytest.approx(ratio)
    assert not softmax["speedup"]
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("timing 2 rows, 0 are done: within 60 minutes")


def test_what_is_timed_is_not_timed_again(tmp_path: Path, timed: list[str]) -> None:
    record = tmp_path / "t.csv"
    results = time_models(SIZES, HOW, record)
    assert timed == list(SIZES)
    again = time_models(SIZES, HOW, record)
    assert timed == list(SIZES)
    assert {name: row["images_per_s"] for name, row in again.items()} == {
        name: row["images_per_s"] for name, row in results.items()
    }


@pytest.mark.parametrize("other", [Timed(2, CPU, "a test", 60), Timed(1, CPU, "elsewhere", 60)])
def test_other_circumstances_are_timed_anew(other: Timed, tmp_path: Path, timed: list[str]) -> None:
    time_models(SIZES, HOW, tmp_path / "t.csv")
    time_models(SIZES, other, tmp_path / "t.csv")
    assert timed == 2 * list(SIZES)
    time_models(SIZES, HOW, tmp_path / "t.csv")
    assert len(timed) == 8


def test_an_interrupted_table_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed: list[str]
) -> None:
    record, real = tmp_path / "t.csv", throughput._time_in_turns

    def stop(pair: list[str], *others: object) -> dict:
        if pair[0].startswith("alt_gvt"):
            raise KeyboardInterrupt
        return real(pair, *others)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(throughput, "_time_in_turns", stop)
        with pytest.raises(KeyboardInterrupt):
            time_models(SIZES, HOW, record)
    assert list(time_models(SIZES, HOW, record)) == list(SIZES)
    assert timed == list(SIZES)


def test_the_budget_is_shared_by_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed: list[str]
) -> None:
    shares = throughput._share_budget(
        {"pvt_v2_b0": list(SIZES)[:2], "alt_gvt_small": list(SIZES)[2:]}, SIZES, HOW, num_done=0
    )
    assert sum(shares.values()) == pytest.approx(3600)
    assert shares["alt_gvt_small"] > 4 * shares["pvt_v2_b0"]


@pytest.mark.parametrize("minutes", [0.0, 1e-9, float("nan")])
def test_a_budget_that_is_too_small_is_refused_beforehand(
    minutes: float, tmp_path: Path, timed: list[str]
) -> None:
    with pytest.raises(InputError, match="raise --time-budget"):
        time_models(SIZES, Timed(1, CPU, "a test", minutes), tmp_path / "t.csv")
    assert not timed and not list(tmp_path.iterdir())
