"""What was measured, as text, as JSON and as a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ecoformer.tools.figures import make_figure, save_figure
from ecoformer.tools.measure import Timing
from ecoformer.tools.table import Column, Row, Value, format_markdown

# Fewer points than this make no slope and no curve.
MIN_POINTS = 3

_COLUMNS = (
    Column("name", "contender"),
    Column("median_ms", "ms", ".4g"),
    Column("quartiles", "quartiles"),
    Column("time_ratio", "x time"),
    Column("images_per_s", "images/s", ".4g"),
    Column("peak_bytes", "peak MiB", ".1f", 2**20),
    Column("memory_ratio", "x memory"),
    Column("least_bytes_per_s", "GB/s of least bytes", ".1f", 1e9),
    Column("copy_share", "% of copy", ".0f", 0.01),
    Column("pass_share", "% of copy by its passes", ".0f", 0.01),
    Column("note", "note"),
)
_SLOPE_COLUMNS = (
    Column("task", "task"),
    Column("name", "contender"),
    Column("time", "time", ".3f"),
    Column("memory", "memory", ".3f"),
)


@dataclass(frozen=True)
class Measurement:
    """One contender in one comparison; the others of a comparison are compared with the first.

    Args:
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
    """How a contender's cost of an image grows with N, as exponents of time and peak memory."""

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
        checks: a line each.
        slope_from: N from which on slopes are fitted.
        done: parts that are measured, and the number of rows after each.
        sample: what a batch has several of.
    """

    environment: dict[str, str]
    copy_bytes_per_s: float
    rows: list[Measurement] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    slope_from: int = 0
    done: dict[str, int] = field(default_factory=dict)
    sample: str = "image"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what ``to_json`` wrote, as far as parts are done.

        Raises:
            LookupError, TypeError, ValueError: it is something else.
        """
        content = json.loads(text)
        del content["slopes"]
        rows = content.pop("rows")[: max(content["done"].values(), default=0)]
        report = cls(**content)
        for row in rows:
            timing = row.pop("timing")
            report.rows.append(Measurement(**row, timing=Timing(**timing) if timing else None))
        return report

    def curves(self) -> dict[tuple[str, str], list[Measurement]]:
        """Find what ran at three N or more: by task and contender, N rising."""
        curves: dict[tuple[str, str], list[Measurement]] = {}
        for row in sorted(self.rows, key=lambda row: row.num_tokens):
            if row.timing:
                curves.setdefault((row.task, row.name), []).append(row)
        return {key: rows for key, rows in curves.items() if len(rows) >= MIN_POINTS}

    def slopes(self) -> list[Slope]:
        """Fit how time and memory of an image grow with N, for each curve."""
        slopes = []
        for (task, name), curve in self.curves().items():
            rows = [row for row in curve if row.num_tokens >= self.slope_from]
            if len(rows) >= MIN_POINTS:
                memory = _memory_points(rows)
                slope = Slope(
                    task,
                    name,
                    _exponent([(row.num_tokens, row.image_ms) for row in rows]),
                    _exponent(memory) if len(memory) >= MIN_POINTS else None,
                )
                slopes.append(slope)
        return slopes

    def to_json(self) -> str:
        """Write everything for a program to read: the fields, and ``slopes``."""
        content = asdict(self) | {"slopes": [asdict(slope) for slope in self.slopes()]}
        return json.dumps(content, indent=1) + "\n"

    def describe_environment(self) -> str:
        """Write how everything was measured, a line a fact."""
        facts = self.environment | {"copy": f"{self.copy_bytes_per_s / 1e9:.1f} GB/s, both ways"}
        return "\n".join(f"{name + ':':10}{fact}" for name, fact in facts.items())

    def describe_slopes(self) -> str:
        """Write how time and memory grow; nothing where there is no curve."""
        if not (slopes := self.slopes()):
            return ""
        rows = [asdict(slope) for slope in slopes]
        each = f"per {self.sample}"
        title = f"exponent of N: time {each}, peak memory {each} (inputs aside)"
        if self.slope_from:
            title = f"{title}, from N={self.slope_from} on"
        return f"{title}\n\n{format_markdown(_SLOPE_COLUMNS, rows)}"

    def describe_comparison(self, rows: Sequence[Measurement]) -> str:
        """Write the contenders of one comparison, the first of which the others are set against."""
        first = rows[0]
        title = f"{first.task}, B={first.batch_size} N={first.num_tokens}"
        cells = [self._describe(row, first) for row in rows]
        columns = [
            replace(column, title=f"{self.sample}s/s") if column.key == "images_per_s" else column
            for column in _COLUMNS
        ]
        return f"{title}\n\n{format_markdown(columns, cells)}"

    def _describe(self, row: Measurement, first: Measurement) -> Row:
        cells: dict[str, Value] = {"name": row.name, "note": row.note}
        if row.peak_bytes is not None:
            cells["peak_bytes"] = row.peak_bytes
            if first.peak_bytes:
                cells["memory_ratio"] = row.peak_bytes / first.peak_bytes
        if row.timing is None:
            return cells
        cells |= {"median_ms": row.timing.median_ms, "images_per_s": 1e3 / row.image_ms}
        if row.timing.num_calls > 1:
            cells["quartiles"] = f"{row.timing.low_ms:.4g}-{row.timing.high_ms:.4g}"
        if first.timing:
            cells["time_ratio"] = row.image_ms / first.image_ms
        seconds = row.timing.median_ms / 1e3
        if row.least_bytes is not None:
            cells["least_bytes_per_s"] = row.least_bytes / seconds
            cells["copy_share"] = row.least_bytes / seconds / self.copy_bytes_per_s
        if row.pass_bytes is not None:
            cells["pass_share"] = row.pass_bytes / seconds / self.copy_bytes_per_s
        return cells

    def draw(self, path: Path) -> None:
        """Draw time and memory of a sample against N, a line a curve, as PNG.

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
        for axes, unit in ((time_axes, "ms"), (memory_axes, "peak MiB")):
            label = f"{unit} per {self.sample}"
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
            axes.grid(which="both", alpha=0.3)
        figure.legend(loc="outside upper center", ncols=2, fontsize="small")
        save_figure(figure, path)


def _memory_points(rows: Sequence[Measurement]) -> list[tuple[int, float]]:
    return [(row.num_tokens, row.peak_bytes / row.batch_size) for row in rows if row.peak_bytes]


def _exponent(points: Sequence[tuple[int, float]]) -> float:
    """Fit the least-squares slope of log y over log x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope
