"""The main table: its figures, what was published, and its three forms."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from ecoformer.checkpoint.zoo import ZOO
from ecoformer.config.schema import field_types
from ecoformer.tools.table import Table, Value
from ecoformer.tools.tables.command import main
from ecoformer.tools.tables.published import MAIN_COLUMNS, MAIN_NOTES, describe_models, list_sizes

# 6.72 G additions, by the released counter too; 6.75 were published.
SLIP = ("pvt_v2_b3/ecoformer", "add")


@cache
def make_table() -> Table:
    rows = describe_models()
    return Table("Models", MAIN_COLUMNS, rows, MAIN_NOTES, {"command": "test"})


def find_row(name: str) -> dict[str, Value]:
    (row,) = (row for row in make_table().rows if row["name"] == name)
    return dict(row)


def test_the_published_table_comes_out_to_its_digits(golden_dir: Path) -> None:
    entries = json.loads((golden_dir / "published_table.json").read_text())
    wrong = []
    for variant, entry in entries.items():
        row = find_row(f"{variant}/ecoformer")
        for key, name in (("mul", "mul_g"), ("add", "add_g"), ("energy_pj", "energy_g_pj")):
            digits = len(str(entry[name]).partition(".")[2])
            if f"{float(row[key] or 0) / 1e9:.{digits}f}" != f"{entry[name]:.{digits}f}":
                wrong.append((row["name"], key))
    assert wrong == [SLIP]
    assert len(entries) == 6


def test_the_difference_is_marked_and_no_other() -> None:
    table = make_table()
    marked = json.loads(table.to_json())["differs_from_published"]
    assert [(table.rows[mark["row"]]["name"], mark["key"]) for mark in marked] == [SLIP]
    text = table.to_markdown()
    assert "6.72 (!= 6.75)" in text
    assert text.count("!=") == 1 + " ".join(MAIN_NOTES).count("!=")


def test_savings_are_those_against_softmax(golden_dir: Path) -> None:
    cost = json.loads((golden_dir / "cost.json").read_text())
    for variant in ("pvt_v2_b0", "alt_gvt_small"):
        ours, theirs = cost[f"{variant}/ecoformer"], cost[f"{variant}/msa"]
        row, baseline = find_row(f"{variant}/ecoformer"), find_row(f"{variant}/msa")
        for key in ("mul", "add", "energy_pj", "area_um2", "parameters"):
            assert (row[key], baseline[key]) == (ours[key], theirs[key])
        saving = 100 * (1 - ours["energy_pj"] / theirs["energy_pj"])
        assert row["saving"] == pytest.approx(saving)
        assert "saving" not in baseline


def test_the_command_writes_three_forms_of_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_table().rows
    monkeypatch.setattr("ecoformer.tools.tables.published.describe_models", lambda: rows)
    assert main(["main", "--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith((tmp_path / "main.md").read_text().rstrip())
    assert json.loads((tmp_path / "main.json").read_text())["rows"] == rows
    with (tmp_path / "main.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [row["name"] for row in rows]
    assert [float(line["energy_pj"]) for line in lines] == [row["energy_pj"] for row in rows]


def test_a_model_is_timed_at_the_size_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(ZOO["ecoformer_pvt_v2_b0"], input_size=96)
    monkeypatch.setitem(ZOO, "ecoformer_pvt_v2_b0", small)
    sizes = list_sizes()
    assert len(sizes) == 12
    assert (sizes["pvt_v2_b0/msa"], sizes["pvt_v2_b1/ecoformer"]) == (96, 224)


def test_the_command_adds_what_was_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(list_sizes())
    monkeypatch.setattr(
        "ecoformer.tools.tables.throughput.time_models",
        lambda sizes, how, record: {
            name: {"name": name, "images_per_s": how.minutes, "load": "0.5"} for name in sizes
        },
    )
    monkeypatch.setattr(
        "ecoformer.tools.tables.published.describe_models", lambda: [{"name": n} for n in names]
    )
    words = ["main", "--throughput", "--time-budget", "7", "--device", "cpu", "--batch-size", "3"]
    assert main([*words, "--output-dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "main.json").read_text())["rows"]
    assert [row["images_per_s"] for row in rows] == [7.0] * 12
    assert "images/s: batches of 3 on " in capsys.readouterr().out


def test_all_data_sets_of_a_run_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["main", "--help"])
    choices = ",".join(get_args(field_types()["data_set"]))
    assert f"{{{choices}}}" in capsys.readouterr().out


def test_an_interrupted_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ecoformer.tools.tables.published.describe_models", interrupt)
    assert main(["main", "--output-dir", str(tmp_path)]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "the same command goes on" in line
    assert not list(tmp_path.iterdir())
