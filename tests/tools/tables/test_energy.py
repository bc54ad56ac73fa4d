"""The table of energy: modelled, executed, with memory, and measured where a machine tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ecoformer.cost import find_prices
from ecoformer.cost.joules import Energy, EnergyMeter, EnergyNotMeasurable
from ecoformer.models.registry import find_family
from ecoformer.ops.backends.native import library
from ecoformer.tools.table import Value
from ecoformer.tools.tables import energy
from ecoformer.tools.tables.command import main
from ecoformer.tools.tables.energy import add_joules, describe_energy
from tests.tools.tables.conftest import Refuse

CPU = torch.device("cpu")
PAPER = find_prices()


def describe(*sizes: int, variant: str = "pvt_v2_b0", **options: object) -> list[dict[str, Value]]:
    settings = {"batch_size": 1, "prices": PAPER, **options}
    return describe_energy([variant], input_sizes=sizes, **settings)[0]  # type: ignore[arg-type]


def test_published_energy_comes_out_to_its_digits(golden_dir: Path) -> None:
    entries = json.loads((golden_dir / "published_table.json").read_text())
    for variant in ("pvt_v2_b0", "alt_gvt_small"):
        row = next(r for r in describe(224, variant=variant) if r["name"] == "ecoformer")
        published = str(entries[variant]["energy_g_pj"])
        digits = len(published.partition(".")[2])
        assert f"{float(row['energy_pj'] or 0) / 1e9:.{digits}f}" == published


def test_every_kind_at_every_size_beside_softmax_of_that_size() -> None:
    rows = describe(32, 64)
    kinds = find_family("pvt_v2_b0").kinds("pvt_v2_b0")
    assert [row["input_size"] for row in rows] == [32] * len(kinds) + [64] * len(kinds)
    for group in (rows[: len(kinds)], rows[len(kinds) :]):
        softmax, *others = group
        assert softmax["name"] == "msa"
        assert not {"saving", "realised", "saving_with_memory"} & softmax.keys()
        for row in others:
            ours, theirs = float(row["energy_pj"] or 0), float(softmax["energy_pj"] or 0)
            assert row["saving"] == pytest.approx(100 * (1 - ours / theirs))


def test_savings_with_memory_and_what_is_realised_by_hand() -> None:
    softmax, row = (next(r for r in describe(64) if r["name"] == k) for k in ("msa", "ecoformer"))

    def total(cells: dict[str, Value], suffix: str, access_pj: float) -> float:
        accesses = float(cells[f"traffic_bytes{suffix}"] or 0) / 8
        return float(cells["energy_pj"] or 0) + access_pj * accesses

    for suffix, key in (("", "saving_with_memory"), ("_with_maps", "saving_with_maps")):
        savings = [
            100 * (1 - total(row, suffix, pj) / total(softmax, suffix, pj)) for pj in (1300, 2600)
        ]
        assert [row[f"{key}_low"], row[f"{key}_high"]] == pytest.approx(savings)
        assert row[key] == f"{savings[0]:.1f} to {savings[1]:.1f}"
    executed = float(softmax["executed"] or 0) - float(row["executed"] or 0)
    saved = float(softmax["energy_pj"] or 0) - float(row["energy_pj"] or 0)
    assert row["realised"] == pytest.approx(100 * 4.6 * executed / saved)


def test_additions_that_this_cpu_executes_are_told_with_their_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"input_sizes": [64], "batch_size": 1, "prices": PAPER}
    if not library.load():
        rows, notes = describe_energy(["pvt_v2_b0"], **settings)  # type: ignore[arg-type]
        told = {
            row["name"]: (row["code_products"], row["code_additions"])
            for row in rows
            if "code_products" in row
        }
        # Two blocks a stage; heads, tokens and head dim 32 of stages 1 to 3; the sum of codes.
        values = sum(2 * heads * tokens * 33 for heads, tokens in ((1, 256), (2, 64), (5, 16)))
        assert told == {"ecoformer": (2 * 16 * values, 2 * 3 * values)}
        assert any("which runs on this CPU" in note for note in notes)
    monkeypatch.setattr(library, "_reason", "no g++")
    rows, notes = describe_energy(["pvt_v2_b0"], **settings)  # type: ignore[arg-type]
    assert not any("code_products" in row for row in rows)
    assert any("as multiply-adds" in note and "(no g++)" in note for note in notes)


def test_other_prices_are_written_beside_the_papers(tmp_path: Path) -> None:
    words = ["energy", "--input-size", "32", "--model", "pvt_v2_b2_li", "--device", "cpu"]
    assert main([*words, "--output-dir", str(tmp_path)]) == 0
    other = ["--node", "7nm", "--precision", "int8", "--output-dir", str(tmp_path)]
    assert main([*words, *other]) == 0
    paper, low = (
        json.loads((tmp_path / f"{name}.json").read_text())["rows"][0]
        for name in ("energy", "energy_7nm_int8")
    )
    assert low["energy_pj"] == pytest.approx(0.07 * paper["mul"] + 0.007 * paper["add"])
    assert low["traffic_bytes"] == paper["traffic_bytes"] / 4
    assert "hbm2_low_pj" in low and "dram_low_pj" in paper
    # Without softmax over all tokens there is nothing to set it against.
    assert "saving" not in paper


def test_prices_that_nobody_published(refuse: Refuse) -> None:
    assert "no published energy" in refuse("energy", "--precision", "bfloat16")


@pytest.fixture
def rows() -> list[dict[str, Value]]:
    return [{"model": "pvt_v2_b0", "input_size": 32, "name": kind} for kind in ("msa", "ecoformer")]


class Meter(EnergyMeter):
    """Says what a counter might: softmax takes three times as much, idle 5 W."""

    def measure(self, call: object, device: torch.device) -> Energy:
        assert callable(call)
        call()
        self.ranges_uj.append(0)
        return Energy(60.0 * (3 if len(self.ranges_uj) == 1 else 1), 60.0, 100)

    def measure_idle(self) -> Energy:
        return Energy(300.0, 60.0, 1)


def test_measured_joules_are_an_images_and_idle_power_is_stated(
    rows: list[dict[str, Value]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(energy, "find_meter", lambda device: Meter("a test", list, []))
    note = add_joules(rows, batch_size=2, device=CPU, is_asked=True)
    assert [row["measured_j"] for row in rows] == [0.9, 0.3]
    assert rows[1]["measured_saving"] == pytest.approx(100 * 2 / 3)
    assert [row["idle_w"] for row in rows] == [5, 5]
    assert "a test, in windows of at least 60 s after 10 s" in note and "5.0 W" in note
    # Beforehand: two rows, and the window in which nothing runs.
    assert "2 models, 3 minutes" in capsys.readouterr().out.splitlines()[0]


def test_joules_are_measured_when_asked_for_alone(
    rows: list[dict[str, Value]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "find_meter", lambda device: Meter("a test", list, []))
    note = add_joules(rows, batch_size=2, device=CPU, is_asked=False)
    assert "--measure in 3 minutes" in note
    assert not any("measured_j" in row for row in rows)


def test_a_machine_without_counters_says_why(
    rows: list[dict[str, Value]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(device: torch.device) -> EnergyMeter:
        raise EnergyNotMeasurable("nobody knows")

    monkeypatch.setattr(energy, "find_meter", find)
    note = add_joules(rows, batch_size=2, device=CPU, is_asked=True)
    assert "not available here: nobody knows" in note
    assert not any("measured_j" in row for row in rows)
