"""What reaches the terminal: one printable line of bounded length, whatever it is about."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ecoformer.config import parse_config, read_config
from ecoformer.engine.logs import print_log
from ecoformer.errors import InputError, one_line, print_error

HOSTILE = {
    "escape": ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    "8-bit escape": ("\x9b2J", r"\x9b2J"),
    "backspace": ("error\x08\x08", r"error\x08\x08"),
    "line breaks": ("a\r\nb\vc\fd\x85e\u2028f", "a b c d e f"),
    "right to left": ("a\u202egpj.exe", r"a\u202egpj.exe"),
    "isolate": ("\u2066a\u2069", r"\u2066a\u2069"),
    "no width": ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
    "surrogate": ("a\udcffb", r"a\udcffb"),
    "tag": ("\U000e0041", r"\U000e0041"),
    "plain": ("Größe 大小 µ", "Größe 大小 µ"),
}


@pytest.mark.parametrize(("text", "line"), HOSTILE.values(), ids=HOSTILE)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line
    assert one_line(InputError(text)) == line


@pytest.mark.parametrize("name", ["x" * 5_000_000, "\x1b" * 5_000_000, "x " * 2_500_000])
def test_long_names_are_cut(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_error(f"entry {name} is unknown; remove it.")
    line = capsys.readouterr().err
    assert line.startswith("error: entry ") and line.endswith(" is unknown; remove it.\n")
    assert len(line) < 2100 and line[:-1].isprintable()


def test_what_is_logged_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    text, line = "".join(text for text, _ in HOSTILE.values()), "\\x1b[2J"
    with print_log():
        logging.getLogger("ecoformer.x").warning("%s: %s", text, 3)
        # A traceback keeps its lines, for those who mend it.
        try:
            raise ValueError(3)
        except ValueError:
            logging.getLogger("ecoformer.x").exception("failed\n")
    first, second, *traceback = capsys.readouterr().out.splitlines()
    assert line in first and first.isprintable() and first.endswith(": 3")
    assert second == "failed"
    assert traceback[0].startswith("Traceback") and traceback[-1] == "ValueError: 3"


def test_names_that_are_not_text(tmp_path: Path) -> None:
    # As a folder from another system arrives: no UTF-8.
    name = os.fsdecode(b"\xff\x1b[2J.yaml")
    (tmp_path / name).write_text("\x1b: 1")
    program = (
        "import sys\n"
        "from ecoformer.config import parse_config\n"
        "from ecoformer.errors import InputError, print_error\n"
        "try:\n    parse_config(['--config', sys.argv[1]])\n"
        "except InputError as error:\n    print_error(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / name)], capture_output=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert rb"\udcff\x1b[2J.yaml: cannot be read" in result.stderr
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("text", [text for text, _ in HOSTILE.values()])
def test_flags_and_fields(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.py").write_text(f"globals()[{text!r}] = 3")
    (tmp_path / "b.py").write_text(f"opt = {text!r}\ndata_set = opt")
    for call in (
        lambda: parse_config([f"--{text}", "3"]),
        lambda: parse_config(["--data-set", text]),
        lambda: parse_config(["--model", text]),
        lambda: read_config(tmp_path / "a.py"),
        lambda: read_config(tmp_path / "b.py"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        print_error(caught.value)
        line = capsys.readouterr().err
        assert line[:-1].isprintable() and line[-1] == "\n"
