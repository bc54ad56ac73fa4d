"""What was measured, as text, as JSON and as a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ecoformer.measure import Timing

# Fewer points than this make no slope and no curve.
_MIN_POINTS = 3


@dataclass(frozen=True)
class Row:
    """One contender in one comparison.

    Args:
        task: what all contenders do.
        name: the contender; the first of a comparison is what the others are compared with.
        batch_size: B.
        num_tokens: N of an image; of the first stage, where a model is timed.
        timing: of one call.
        peak_bytes: memory of a call at its peak, or None where it was not measured.
        least_bytes: what any implementation reads and writes: inputs once, outputs once.
        pass_bytes: what the passes of this implementation read and write.
        note: how the figure came about, where it was not plainly measured.
    """

    task: str
    name: str
    batch_size: int
    num_tokens: int
    timing: Timing
    peak_bytes: int | None = None
    least_bytes: int | None = None
    pass_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All that one command measured.

    Args:
        environment: date, hardware, versions and command, by name.
        copy_bytes_per_s: what a large copy reads and writes.
        rows: in the order measured.
    """

    environment: dict[str, str]
    copy_bytes_per_s: float
    rows: Sequence[Row]

    def curves(self) -> dict[tuple[str, str], list[Row]]:
        """Find what was measured at three N or more.

        Returns:
            Rows by task and name of the contender, N rising.
        """
        curves: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.num_tokens):
            curves.setdefault((row.task, row.name), []).append(row)
        return {key: rows for key, rows in curves.items() if len(rows) >= _MIN_POINTS}

    def slopes(self) -> list[dict[str, str | float | None]]:
        """Fit how time and memory of an image grow with N.

        Returns:
            An entry a curve: ``task``, ``name``, and the exponents ``time`` and ``memory``, None
            where there are too few points.
        """
        return [
            {
                "task": task,
                "name": name,
                "time": _exponent((row.num_tokens, _image_ms(row)) for row in rows),
                "memory": _exponent(_memory_points(rows)),
            }
            for (task, name), rows in self.curves().items()
        ]

    def to_json(self) -> str:
        """Write everything for a program to read.

        Returns:
            JSON: the fields of the report, and ``slopes``.
        """
        content = asdict(self) | {"slopes": self.slopes()}
        return json.dumps(content, indent=1) + "\n"

    def to_text(self) -> str:
        """Write everything for a person to read.

        Returns:
            Facts, a table a comparison, and exponents of N.
        """
        facts = self.environment | {"copy": f"{self.copy_bytes_per_s / 1e9:.1f} GB/s, both ways"}
        lines = [f"{name + ':':10}{fact}" for name, fact in facts.items()]
        comparisons: dict[str, list[Row]] = {}
        for row in self.rows:
            title = f"{row.task}, B={row.batch_size} N={row.num_tokens}"
            comparisons.setdefault(title, []).append(row)
        for title, rows in comparisons.items():
            lines += ["", title, *self._table(rows)]
        if slopes := self.slopes():
            cells = [
                (
                    f"{slope['task']}: {slope['name']}",
                    f"{slope['time']:.3f}",
                    "-" if slope["memory"] is None else f"{slope['memory']:.3f}",
                )
                for slope in slopes
            ]
            lines += ["", "exponent of N, an image"]
            lines += format_table(("", "time", "memory"), cells)
        return "\n".join(lines)

    def _table(self, rows: Sequence[Row]) -> list[str]:
        first = rows[0]
        titles = ("", "ms", "quartiles", "x time", "images/s", "peak MiB", "x memory")
        cells: list[tuple[str, ...]] = []
        for row in rows:
            timing, peak = row.timing, row.peak_bytes
            cells.append(
                (
                    row.name,
                    f"{timing.median_ms:.4g}",
                    f"{timing.low_ms:.4g}-{timing.high_ms:.4g}" if timing.num_calls > 1 else "-",
                    f"{timing.median_ms / first.timing.median_ms:.2f}",
                    f"{1e3 / _image_ms(row):.4g}",
                    "-" if peak is None else f"{peak / 2**20:.1f}",
                    f"{peak / first.peak_bytes:.2f}" if peak and first.peak_bytes else "-",
                    self._bandwidth(row),
                    row.note,
                )
            )
        return format_table(
            (*titles, "GB/s of least bytes" if first.least_bytes else "", ""), cells
        )

    def _bandwidth(self, row: Row) -> str:
        if row.least_bytes is None:
            return ""
        rate = row.least_bytes / row.timing.median_ms * 1e3
        text = f"{rate / 1e9:.1f}, {rate / self.copy_bytes_per_s:.0%} of copy"
        if row.pass_bytes is not None:
            share = rate * row.pass_bytes / row.least_bytes / self.copy_bytes_per_s
            text += f", {share:.0%} by its passes"
        return text

    def draw(self, path: Path) -> None:
        """Draw time and memory of an image against N, a line a curve.

        Args:
            path: the picture; its ending is the format.
        """
        # Half a second to import, and only a picture needs it.
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(11, 4.5))
        for (task, name), rows in self.curves().items():
            label = f"{task}: {name}"
            times = [_image_ms(row) for row in rows]
            time_axes.plot([row.num_tokens for row in rows], times, marker="o", label=label)
            if points := _memory_points(rows):
                numbers, bytes_ = zip(*points, strict=True)
                memory_axes.plot(numbers, [peak / 2**20 for peak in bytes_], marker="o")
        for axes, unit in ((time_axes, "ms an image"), (memory_axes, "peak MiB an image")):
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
            axes.grid(which="both", alpha=0.3)
        figure.legend(loc="outside upper center", ncols=2, fontsize="small")
        figure.savefig(path, bbox_inches="tight", dpi=150)
        pyplot.close(figure)


def _image_ms(row: Row) -> float:
    return row.timing.median_ms / row.batch_size


def _memory_points(rows: Sequence[Row]) -> list[tuple[int, float]]:
    return [(row.num_tokens, row.peak_bytes / row.batch_size) for row in rows if row.peak_bytes]


def _exponent(points: Iterable[tuple[int, float]]) -> float | None:
    """Least-squares slope of log y over log x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    if len(logs) < _MIN_POINTS:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def format_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first and the last to the left, the others to the right.

    Args:
        titles: of the columns.
        rows: cells.

    Returns:
        Lines, the titles first.
    """
    columns = list(zip(titles, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if index in (0, last) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in zip(*columns, strict=True)
    ]
