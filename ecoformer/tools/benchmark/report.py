"""What was measured, as text, as JSON and as a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ecoformer.tools.figures import make_figure, save_figure
from ecoformer.tools.measure import Timing

# Fewer points than this make no slope and no curve.
MIN_POINTS = 3


@dataclass(frozen=True)
class Row:
    """One contender in one comparison.

    Args:
        task: what all contenders do.
        name: the contender; the first of a comparison is what the others are compared with.
        batch_size: B.
        num_tokens: N of an image; of the first stage, where a model is timed.
        timing: of one call, or None where it did not run.
        peak_bytes: memory of a call at its peak, or None where it was not measured.
        least_bytes: what any implementation reads and writes: inputs once, outputs once.
        pass_bytes: what the passes of this implementation read and write.
        note: why a figure is missing.
    """

    task: str
    name: str
    batch_size: int
    num_tokens: int
    timing: Timing | None
    peak_bytes: int | None = None
    least_bytes: int | None = None
    pass_bytes: int | None = None
    note: str = ""

    @property
    def image_ms(self) -> float:
        """Median time an image; not a number where the contender did not run."""
        return self.timing.median_ms / self.batch_size if self.timing else math.nan


@dataclass(frozen=True)
class Slope:
    """How a contender's cost of an image grows with N, as exponents.

    Args:
        task: what it does.
        name: the contender.
        time: exponent of its median time.
        memory: exponent of its peak memory, or None where that was not measured.
    """

    task: str
    name: str
    time: float
    memory: float | None


@dataclass(frozen=True)
class Report:
    """All that one command measured.

    Args:
        environment: date, hardware, versions and command, by name.
        copy_bytes_per_s: what a large copy reads and writes.
        rows: in the order measured.
        findings: checks and goals, a line each.
    """

    environment: dict[str, str]
    copy_bytes_per_s: float
    rows: list[Row] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def curves(self) -> dict[tuple[str, str], list[Row]]:
        """Find what was measured at three N or more.

        Returns:
            Rows by task and name of the contender, N rising.
        """
        curves: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.num_tokens):
            if row.timing:
                curves.setdefault((row.task, row.name), []).append(row)
        return {key: rows for key, rows in curves.items() if len(rows) >= MIN_POINTS}

    def slopes(self) -> list[Slope]:
        """Fit how time and memory of an image grow with N.

        Returns:
            One a curve.
        """
        return [
            Slope(
                task,
                name,
                _exponent([(row.num_tokens, row.image_ms) for row in rows]),
                _exponent(points) if len(points := _memory_points(rows)) >= MIN_POINTS else None,
            )
            for (task, name), rows in self.curves().items()
        ]

    def to_json(self) -> str:
        """Write everything for a program to read.

        Returns:
            JSON: the fields of the report, and ``slopes``.
        """
        content = asdict(self) | {"slopes": [asdict(slope) for slope in self.slopes()]}
        return json.dumps(content, indent=1) + "\n"

    def describe_environment(self) -> str:
        """Write how everything was measured.

        Returns:
            A line a fact.
        """
        facts = self.environment | {"copy": f"{self.copy_bytes_per_s / 1e9:.1f} GB/s, both ways"}
        return "\n".join(f"{name + ':':10}{fact}" for name, fact in facts.items())

    def describe_slopes(self) -> str:
        """Write how time and memory grow.

        Returns:
            A table, or nothing where there is no curve.
        """
        if not (slopes := self.slopes()):
            return ""
        cells = [
            (
                f"{slope.task}: {slope.name}",
                f"{slope.time:.3f}",
                "-" if slope.memory is None else f"{slope.memory:.3f}",
            )
            for slope in slopes
        ]
        return "\n".join(
            [
                "exponent of N: time an image, peak memory an image (inputs aside)",
                *format_table(("", "time", "memory"), cells),
            ]
        )

    def describe_comparison(self, rows: Sequence[Row]) -> str:
        """Write one comparison.

        Args:
            rows: of all contenders at one size, the first of which is compared with.

        Returns:
            A title and a table.
        """
        first = rows[0]
        titles = ["", "ms", "quartiles", "x time", "images/s", "peak MiB", "x memory"]
        titles += ["GB/s of least bytes" if first.least_bytes else "", ""]
        cells: list[tuple[str, ...]] = []
        for row in rows:
            timing, peak = row.timing, row.peak_bytes
            times = ("-", "-", "-", "-")
            if timing:
                times = (
                    f"{timing.median_ms:.4g}",
                    f"{timing.low_ms:.4g}-{timing.high_ms:.4g}" if timing.num_calls > 1 else "-",
                    f"{row.image_ms / first.image_ms:.2f}" if first.timing else "-",
                    f"{1e3 / row.image_ms:.4g}",
                )
            cells.append(
                (
                    row.name,
                    *times,
                    "-" if peak is None else f"{peak / 2**20:.1f}",
                    f"{peak / first.peak_bytes:.2f}" if peak and first.peak_bytes else "-",
                    self._bandwidth(row),
                    row.note,
                )
            )
        title = f"{first.task}, B={first.batch_size} N={first.num_tokens}"
        return "\n".join([title, *format_table(titles, cells)])

    def pass_share(self, row: Row) -> float:
        """Compare the passes of an implementation with a copy.

        Args:
            row: of a contender whose passes are known.

        Returns:
            The bytes a second that they read and write, as a share of a copy's.
        """
        assert row.timing is not None and row.pass_bytes is not None
        return row.pass_bytes / row.timing.median_ms * 1e3 / self.copy_bytes_per_s

    def _bandwidth(self, row: Row) -> str:
        if row.least_bytes is None or row.timing is None:
            return ""
        rate = row.least_bytes / row.timing.median_ms * 1e3
        text = f"{rate / 1e9:.1f}, {rate / self.copy_bytes_per_s:.0%} of copy"
        if row.pass_bytes is not None:
            text += f", {self.pass_share(row):.0%} by its passes"
        return text

    def draw(self, path: Path) -> None:
        """Draw time and memory of an image against N, a line a curve.

        Args:
            path: of the picture, a PNG.

        Raises:
            InputError: the disk refuses.
        """
        figure, (time_axes, memory_axes) = make_figure(2, width=5.5, height=4.5)
        for (task, name), rows in self.curves().items():
            label = f"{task}: {name}"
            times = [row.image_ms for row in rows]
            time_axes.plot([row.num_tokens for row in rows], times, marker="o", label=label)
            if points := _memory_points(rows):
                numbers, bytes_ = zip(*points, strict=True)
                memory_axes.plot(numbers, [peak / 2**20 for peak in bytes_], marker="o")
        for axes, unit in ((time_axes, "ms an image"), (memory_axes, "peak MiB an image")):
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
            axes.grid(which="both", alpha=0.3)
        figure.legend(loc="outside upper center", ncols=2, fontsize="small")
        save_figure(figure, path)


def _memory_points(rows: Sequence[Row]) -> list[tuple[int, float]]:
    return [(row.num_tokens, row.peak_bytes / row.batch_size) for row in rows if row.peak_bytes]


def _exponent(points: Sequence[tuple[int, float]]) -> float:
    """Least-squares slope of log y over log x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
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
