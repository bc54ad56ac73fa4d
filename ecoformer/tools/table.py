"""Write a table as aligned Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeGuard

from ecoformer.files import write_text

# What a cell holds: a number, words, or nothing.
Value = float | str | None
Row = Mapping[str, Value]


@dataclass(frozen=True)
class Column:
    """How the values of one key are shown.

    Args:
        spec: format of numbers.
        scale: what one unit of the title is in units of the value.
        published: key of the value that was published for the same thing; it follows in brackets,
            after ``!=`` where the digits that it has do not come out.
    """

    key: str
    title: str
    spec: str = ".2f"
    scale: float = 1.0
    published: str | None = None

    def format(self, row: Row) -> str:
        """Write a cell; a missing value leaves it empty."""
        value, published = row.get(self.key), self._published(row)
        text = f"{value / self.scale:{self.spec}}" if _is_number(value) else str(value or "")
        if published is None:
            return text
        return f"{text} ({'!= ' * self.differs(row)}{published})".lstrip()

    def differs(self, row: Row) -> bool:
        """Compare a value with the published one, to the digits of that; False without either."""
        value, published = row.get(self.key), self._published(row)
        if not (_is_number(value) and _is_number(published)):
            return False
        digits = len(str(published).partition(".")[2])
        return f"{value / self.scale:.{digits}f}" != f"{published:.{digits}f}"

    def holds_numbers(self, rows: Sequence[Row]) -> bool:
        """Whether the column aligns to the right, as numbers do."""
        return any(_is_number(row.get(self.key)) or self._published(row) for row in rows)

    def _published(self, row: Row) -> Value:
        return row.get(self.published) if self.published else None


@dataclass(frozen=True)
class Table:
    """Rows, what their values mean, and where they come from.

    Args:
        columns: what Markdown shows; CSV and JSON hold all values, unrounded.
        notes: what a reader has to know, a sentence or more each.
        environment: date, hardware, versions and command, by name.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str]
    environment: Mapping[str, str]

    def to_markdown(self) -> str:
        """Write the table for people."""
        return "\n".join(
            [
                f"## {self.title}",
                "",
                format_markdown(self.columns, self.rows),
                "",
                *(f"- {note}" for note in self.notes),
                *(f"- {name}: {fact}" for name, fact in self.environment.items()),
            ]
        )

    def to_json(self) -> str:
        """Write everything for a program, with the cells that differ from published values."""
        content = {
            "title": self.title,
            "rows": self.rows,
            "differs_from_published": [
                {"row": index, "key": column.key}
                for index, row in enumerate(self.rows)
                for column in self.columns
                if column.differs(row)
            ],
            "columns": [asdict(column) for column in self.columns],
            "notes": self.notes,
            "environment": self.environment,
        }
        return json.dumps(content, indent=1)

    def write(self, folder: Path, name: str) -> None:
        """Write ``NAME.md``, ``NAME.csv`` and ``NAME.json``, each whole or not at all.

        Raises:
            InputError: the disk refuses.
        """
        for ending, text in (
            ("md", self.to_markdown()),
            ("csv", format_csv(self.rows)),
            ("json", self.to_json()),
        ):
            write_text(folder / f"{name}.{ending}", text.rstrip() + "\n")


def format_markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Write rows in Markdown that can be read as text too; empty columns are left out."""
    cells = {
        column: [column.title, *texts]
        for column in columns
        if any(texts := [column.format(row) for row in rows])
    }
    padded = []
    for place, (column, texts) in enumerate(cells.items()):
        width = max(map(len, texts))
        if place and column.holds_numbers(rows):
            texts = [texts[0], "-" * (width - 1) + ":", *texts[1:]]
            padded.append([text.rjust(width) for text in texts])
        else:
            texts = [texts[0], "-" * width, *texts[1:]]
            padded.append([text.ljust(width) for text in texts])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*padded, strict=True))


def format_csv(rows: Sequence[Row]) -> str:
    """Write all values, one line a row below the keys, which stand in order of appearance."""
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, Value]]:
    """Read the rows that ``format_csv`` wrote, all values as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float))
