"""The benchmark: right arithmetic, and every task runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ecoformer import measure
from ecoformer.benchmark import fits
from ecoformer.benchmark.__main__ import main
from ecoformer.benchmark.compare import Setup
from ecoformer.benchmark.report import Report, Row, format_table
from ecoformer.measure import Call, PeakMemory, Timing

CPU = torch.device("cpu")


def make_row(name: str, num_tokens: int, ms: float, peak_bytes: int | None = None) -> Row:
    """A row of two images."""
    return Row("task", name, 2, num_tokens, Timing(ms, ms, ms, 1), peak_bytes)


def test_report_compares_and_fits_slopes(tmp_path: Path) -> None:
    counts = (10, 100, 1000)
    rows = [make_row("linear", n, 0.5 * n, 64 * n) for n in counts]
    rows += [make_row("quadratic", n, 0.01 * n**2) for n in counts]
    report = Report({"command": "x"}, 1e9, rows)
    linear, quadratic = report.slopes()
    assert (linear["time"], linear["memory"]) == pytest.approx((1, 1))
    assert quadratic["time"] == pytest.approx(2)
    assert quadratic["memory"] is None
    # At N = 1000: 10,000 ms against 500.
    (line,) = [
        line for line in report.to_text().splitlines() if line.startswith("quadratic  1e+04")
    ]
    assert line.split()[3] == "20.00"
    assert json.loads(report.to_json())["rows"][0]["timing"]["median_ms"] == 5
    report.draw(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_bandwidth_is_a_share_of_the_copy() -> None:
    row = Row("task", "a", 1, 1, Timing(1, 1, 1, 1), None, 10**6, 2 * 10**6)
    text = Report({}, 4e9, [row]).to_text()
    assert "1.0, 25% of copy, 50% by its passes" in text


def test_table_aligns() -> None:
    assert format_table(("a", "b", "c"), [("long", "1", "x")]) == ["a     b  c", "long  1  x"]


def test_dense_fit_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    def model_ms(bits: int, steps: int) -> float:
        return 50 + bits * (7 + 3 * steps)

    def pretend(calls: dict[str, Call], **_: object) -> dict[str, Timing]:
        sizes = {"one": (1, 1), "steps": (1, 11), "bits": (2, 1)}
        return {
            name: Timing.of([model_ms(*sizes[name]) / 1e3 if name in sizes else 1.0])
            for name in calls
        }

    monkeypatch.setattr(fits, "time_interleaved", pretend)
    monkeypatch.setattr(PeakMemory, "measure", lambda self, build: None)
    setup = Setup(CPU, torch.float32, 1, PeakMemory(CPU))
    shipped, dense = fits.measure_fit(setup, batch_size=1, num_tokens=64)
    assert shipped.timing.median_ms == pytest.approx(1000)
    assert dense.timing.median_ms == pytest.approx(model_ms(16, 100))
    assert "extrapolated" in dense.note


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("attention", {"ecoformer", "reference", "sdpa", "performer", "spatial reduction"}),
        ("fit", {"ecoformer", "reference"}),
        ("model", {"ecoformer", "ecoformer, reference ops", "msa", "sra", "timm"}),
        ("train", {"ecoformer", "performer", "timm"}),
    ],
)
def test_tasks_run(
    task: str,
    expected: set[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One test above starts the process that measures memory; it takes seconds.
    monkeypatch.setattr(PeakMemory, "measure", lambda self, build: None)
    monkeypatch.setitem(measure._COPY_BYTES, "cpu", 2**20)
    file = tmp_path / "figures.json"
    words = [task, "--device", "cpu", "--resolutions", "32", "--batch-size", "2", "--rounds", "1"]
    assert main([*words, "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert {row["name"] for row in content["rows"]} >= expected
    assert all(row["timing"]["median_ms"] > 0 for row in content["rows"])
    assert content["environment"]["command"].endswith(str(file))
    assert "x time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--resolutions", "16"], "32 pixels"),
        (["--rounds", "0"], "--rounds"),
        (["--model", "pvt_v2_b9", "model"], "pvt_v2_b0"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


def test_missing_cuda_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err
