"""A table as Markdown, CSV and JSON."""

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
    """One column.

    Args:
        key: of its values in a row.
        title: its head, with the unit.
        digits: after the point, where the values are numbers.
        scale: what one unit of the head is in units of the value.
        published: key of the value that was published for the same thing, if any was; it follows
            in brackets, after ``!=`` where the digits that it has do not come out.
    """

    key: str
    title: str
    digits: int = 2
    scale: float = 1.0
    published: str | None = None

    def format(self, row: Row) -> str:
        """Write a row's cell.

        Args:
            row: values by key; one that is missing leaves the cell empty.

        Returns:
            The value, and the published one in brackets, marked where they differ.
        """
        value = row.get(self.key)
        published = row.get(self.published) if self.published else None
        text = f"{value / self.scale:.{self.digits}f}" if _is_number(value) else str(value or "")
        if published is None:
            return text
        return f"{text} ({'!= ' * self.differs(row)}{published})".lstrip()

    def differs(self, row: Row) -> bool:
        """Compare a row's value with the published one, to the digits of that.

        Args:
            row: values by key.

        Returns:
            True where they differ; False also where there is nothing to compare.
        """
        value, published = row.get(self.key), row.get(self.published or "")
        if not (_is_number(value) and _is_number(published)):
            return False
        digits = len(str(published).partition(".")[2])
        return f"{value / self.scale:.{digits}f}" != f"{published:.{digits}f}"


@dataclass(frozen=True)
class Table:
    """Rows, what the columns mean, and where the figures come from.

    Args:
        title: one line.
        columns: those that Markdown shows; CSV and JSON hold all values, unrounded.
        rows: values by key.
        notes: what a reader has to know, a sentence or more each.
        environment: date, hardware, versions and command, by name.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str]
    environment: Mapping[str, str]

    def to_markdown(self) -> str:
        """Write the table for people.

        Returns:
            Markdown without empty columns, aligned so that it can be read as text too.
        """
        heads = [column.title for column in self.columns]
        cells = [[column.format(row) for column in self.columns] for row in self.rows]
        filled = [index for index, _ in enumerate(heads) if any(line[index] for line in cells)]
        lines = [[line[index] for index in filled] for line in [heads, *cells]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        # The first column is a name, the others are numbers.
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        padded = (
            [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines
        )
        return "\n".join(
            [
                f"## {self.title}",
                "",
                *("| " + " | ".join(line) + " |" for line in padded),
                "",
                *(f"- {note}" for note in self.notes),
                *(f"- {name}: {fact}" for name, fact in self.environment.items()),
            ]
        )

    def to_csv(self) -> str:
        """Write all values for a spreadsheet.

        Returns:
            CSV, one line a row below the head.
        """
        return format_csv(self.rows)

    def to_json(self) -> str:
        """Write everything for a program to read.

        Returns:
            JSON: rows with their keys, what differs from the published values, columns, notes,
            environment.
        """
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

        Args:
            folder: where to; made if missing.
            name: of the files.

        Raises:
            InputError: the disk refuses.
        """
        for ending, text in (
            ("md", self.to_markdown()),
            ("csv", self.to_csv()),
            ("json", self.to_json()),
        ):
            write_text(folder / f"{name}.{ending}", text.rstrip() + "\n")


def format_csv(rows: Sequence[Row]) -> str:
    """Write rows as CSV.

    Args:
        rows: values by key; the columns are the keys in order of appearance.

    Returns:
        A head line, then one a row.
    """
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float))
