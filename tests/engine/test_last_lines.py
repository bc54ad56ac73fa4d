"""However a run ends, its last word is one line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch

from ecoformer.config.schema import field_types
from ecoformer.config.types import list_choices
from ecoformer.engine import train
from ecoformer.engine.command import run_command
from ecoformer.engine.logs import read_log
from ecoformer.errors import InputError
from tests.reliability.runs import TINY

LARGE = str(2**62)
# What R18 does not draw: where things are, and what makes a run long.
SPARED = {
    *("config", "data_path", "data_set", "output_dir", "model", "task", "compile", "epochs"),
    *("device", "num_workers", "num_fit_steps", "throughput", "checkpoint_every"),
}


@pytest.fixture
def flags(image_folder: Path, tmp_path: Path) -> list[str]:
    return [
        *("--data-path", str(image_folder), "--output_dir", str(tmp_path / "run")),
        *("--batch-size", "8", "--num-workers", "0", "--no-repeated-aug", "--input-size", "32"),
        *("--device", "cpu", "--nbits", "4", "--anchor", "6", "--topk", "3"),
        *("--num-fit-steps", "3", "--epochs", "1", "--warmup-epochs", "0"),
    ]


def last_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and all of standard error, at most a line."""
    capsys.readouterr()
    code = run_command(flags, TINY)
    said = capsys.readouterr().err
    assert said.count("\n") <= 1, said
    assert said.startswith("error: ") == bool(code)
    return code, said


@pytest.mark.parametrize("name", ["batch-size", "input-size", "nbits", "anchor"])
def test_sizes_that_no_memory_has(
    name: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = last_line([*flags, f"--{name}", LARGE], capsys)
    assert code == 2, said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes\nat x"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_out_of_memory(
    error: Exception,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(train, "update_weights", fail)
    code, said = last_line(flags, capsys)
    assert code == 2
    assert "out of memory" in said
    assert "--batch-size" in said


def test_errors_of_ours_keep_their_traceback(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(train, "update_weights", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run_command(flags, TINY)


def test_a_folder_that_is_not_utf8(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.fsdecode(bytes(tmp_path) + b"/\xff")
    code, said = last_line([*flags, "--output_dir", folder], capsys)
    assert code == 2
    assert "is not UTF-8" in said


def test_a_log_that_is_too_deep(tmp_path: Path) -> None:
    good = json.dumps({"epoch": 0, "train_loss": 0.5})
    (tmp_path / "log.txt").write_text(f"{good}\n" + "[" * 100_000 + "\n")
    assert len(read_log(tmp_path)) == 1
    (tmp_path / "log.txt").write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match="is no log of a run"):
        read_log(tmp_path)


INTERRUPTED = """
import sys
from ecoformer.engine.command import run_command

class Finder:
    def find_spec(self, name, *rest):
        if name == "ecoformer.engine.resume":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
raise SystemExit(run_command(["--model", "pvt_v2_b0", "--data-set", "DIGITS"]))
"""


def test_ctrl_c_while_it_imports() -> None:
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr.startswith("error: interrupted")
    assert ended.stderr.count("\n") == 1


def draw_words(draw: random.Random) -> list[str]:
    """One to four flags, with values that mostly have a meaning."""
    words: list[str] = []
    for name in draw.sample(sorted(field_types().keys() - SPARED), draw.randint(1, 4)):
        flag = "--" + name.replace("_", draw.choice("-_"))
        hint = field_types()[name]
        if hint is bool:
            words.append(draw.choice([flag, flag.replace("--", "--no-", 1)]))
            continue
        choices: list[Any] = ["0", "1", "2", "3", "0.5", "1e-3", "none", "-1", "x", ""]
        num_values = 1
        for choice in list_choices(hint):
            if get_origin(choice) is tuple:
                num_values = draw.randint(1, 2)
                choice = get_args(choice)[0]
            choices += 3 * [value for value in get_args(choice) if isinstance(value, str)]
        words += [flag, *draw.choices(choices, k=num_values)]
    return words


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    def stop(*arguments: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("first", "num_lines"), [(0, 30), pytest.param(30, 1000, marks=pytest.mark.slow)]
)
def test_random_command_lines(
    first: int,
    num_lines: int,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """R18, to the end of a run."""
    codes: list[int] = []
    for seed in range(first, first + num_lines):
        words = draw_words(random.Random(seed))
        folder = ["--output_dir", str(tmp_path / str(seed))]
        with limit(60):
            code, said = last_line([*flags, *words, *folder], capsys)
        assert code in (0, 2, 3), (words, said)
        codes.append(code)
    print({code: codes.count(code) for code in set(codes)})
    assert codes.count(0) >= num_lines // 10
