"""Progress on a terminal and elsewhere, and the lines of log.txt."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from ecoformer.engine import logs
from ecoformer.engine.folder import RunFolder
from ecoformer.engine.logs import RunLog, format_seconds, print_log, read_log, track
from ecoformer.errors import InputError


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
    path.write_bytes("\n".join([*lines, "null", "3", '{"epoch": 1, "tra']).encode() + b"\xff\0")
    assert [record["epoch"] for record in read_log(tmp_path)] == [0, 1, 2, 3]
    with RunLog(RunFolder(tmp_path), first_epoch=2) as log:
        assert path.read_text() == f"{lines[0]}\n{lines[1]}\n"
        log.write({"epoch": 2, "train_loss": 0.25})
    assert json.loads(path.read_text().splitlines()[-1]) == {"epoch": 2, "train_loss": 0.25}


@pytest.mark.parametrize("content", [b"3\n", b"\xff\n", b"{}\n", b'{"epoch": 1, "tra'])
def test_what_is_no_log(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"log\.txt is no log of a run"):
        read_log(tmp_path)


def epochs_of(path: Path) -> list[int]:
    """The epochs of a log, all of whose lines are whole."""
    return [json.loads(line)["epoch"] for line in path.read_text().splitlines()]


def test_lines_that_a_full_disk_refused_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.txt"
    with RunLog(RunFolder(tmp_path), first_epoch=0) as log:
        log.write({"epoch": 0, "train_loss": 0.5})
        with monkeypatch.context() as full:
            # By then the line is in the file.
            full.setattr(os, "fsync", refuse)
            for epoch in (1, 2):
                log.write({"epoch": epoch, "train_loss": 0.5})
                assert epochs_of(path) == [0]
        assert caplog.text.count("No space left on device") == 2
        log.write({"epoch": 3, "train_loss": 0.5})
        assert epochs_of(path) == [0, 1, 2, 3]
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(InputError, match=r"log\.txt: cannot be written \(No space left"):
            log.write({"epoch": 4, "train_loss": 0.5}, is_last=True)
    assert epochs_of(path) == [0, 1, 2, 3]


def test_events_that_a_full_disk_refused_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with RunLog(RunFolder(tmp_path), first_epoch=0) as log:
        log.write({"epoch": 0, "train_loss": 0.5})
        with monkeypatch.context() as full:
            full.setattr(SummaryWriter, "flush", refuse)
            log.write({"epoch": 1, "train_loss": 0.4})
        assert "events cannot be written (No space left on device)" in caplog.text
        log.write({"epoch": 2, "train_loss": 0.3})
    # Of the two files the second one takes back what the first one may hold of an epoch.
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train_loss")
    assert [(event.step, round(event.value, 6)) for event in events] == [
        (0, 0.5),
        (1, 0.4),
        (2, 0.3),
    ]


def refuse(*arguments: object) -> None:
    """What a full disk says."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (90061, "1 day, 1:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
