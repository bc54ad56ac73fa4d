"""Progress on a terminal and elsewhere, and the lines of log.txt."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ecoformer.engine import logs
from ecoformer.engine.logs import RunLog, format_seconds, print_log, track


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    # Four seconds an item.
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr(logs.time, "monotonic", lambda: float(next(clock)))
    items = track(range(6), "epoch 2", total=8, start=2, note=lambda: "loss 0.5")
    assert list(items) == list(range(6))
    assert capsys.readouterr().err.splitlines() == [
        "epoch 2 5/8 loss 0.5 0:00:12 left",
        "epoch 2 8/8 loss 0.5 0:00:00 left",
    ]


def test_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(track(range(3), "evaluate", total=5, start=2)) == [0, 1, 2]
    assert "evaluate" in capsys.readouterr().err


def test_other_ranks_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "is_main", lambda: False)
    monkeypatch.setattr(logs, "_SECONDS_BETWEEN_LINES", 0.0)
    assert list(track(range(3), "epoch 0", total=3)) == [0, 1, 2]
    with print_log():
        logging.getLogger("ecoformer.engine").info("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_log_is_printed_inside_the_block_only(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("ecoformer.engine")
    with print_log():
        logger.info("inside")
    logger.info("outside")
    assert capsys.readouterr().out == "inside\n"
    assert logging.getLogger("ecoformer").propagate


def test_lines_of_epochs_to_come_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    lines = [json.dumps({"epoch": epoch, "train_loss": 0.5}) for epoch in range(4)]
    path.write_text("\n".join([*lines, "null", '{"epoch": 1, "tra']))
    with RunLog(tmp_path, first_epoch=2) as log:
        assert path.read_text() == f"{lines[0]}\n{lines[1]}\n"
        log.write({"epoch": 2, "train_loss": 0.25})
    assert json.loads(path.read_text().splitlines()[-1]) == {"epoch": 2, "train_loss": 0.25}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (90061, "1 day, 1:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
