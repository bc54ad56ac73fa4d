"""Tables: what a cell shows, and how columns stand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ecoformer.tools.table import Column, Row, Table, format_markdown


@pytest.mark.parametrize(
    ("value", "published", "text"),
    [
        (2.489e9, 2.5, "2.49 (2.5)"),
        (2.44e9, 2.5, "2.44 (!= 2.5)"),
        (None, 70.44, "(70.44)"),
        (2e9, None, "2.00"),
        (None, None, ""),
    ],
)
def test_a_cell_shows_both_values(value: float | None, published: float | None, text: str) -> None:
    column = Column("x", "x", scale=1e9, published="y")
    assert column.format({"x": value, "y": published}) == text


def test_columns_without_a_value_are_left_out() -> None:
    table = Table("T", (Column("a", "A"), Column("b", "B")), [{"a": 1.0}], [], {})
    assert table.to_markdown().splitlines()[2:5] == ["| A    |", "| ---- |", "| 1.00 |"]


def test_words_align_to_the_left_and_numbers_to_the_right() -> None:
    columns = (Column("name", "n"), Column("ms", "ms", ".1f"), Column("note", "note"))
    rows: list[Row] = [{"name": 7.0, "ms": 10.0}, {"name": "b", "ms": None, "note": "long"}]
    assert format_markdown(columns, rows).splitlines() == [
        "| n    |   ms | note |",
        "| ---- | ---: | ---- |",
        "| 7.00 | 10.0 |      |",
        "| b    |      | long |",
    ]


def test_three_forms_hold_the_same_values(tmp_path: Path) -> None:
    rows: list[Row] = [{"a": 1 / 3, "name": "x"}, {"name": "y, z", "other": 2}]
    table = Table("T", (Column("name", "N"), Column("a", "A")), rows, ["a note"], {"date": "today"})
    table.write(tmp_path, "t")
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == rows
    with (tmp_path / "t.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert lines == [
        {"a": str(1 / 3), "name": "x", "other": ""},
        {"a": "", "name": "y, z", "other": "2"},
    ]
    text = (tmp_path / "t.md").read_text().splitlines()
    assert text[0] == "## T"
    assert text[4] == "| x    | 0.33 |"
    assert text[-2:] == ["- a note", "- date: today"]
