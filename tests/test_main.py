"""The one door: help at once, one spelling of flags, one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ecoformer
from ecoformer import public
from ecoformer.__main__ import COMMANDS, main
from ecoformer.config.arguments import ArgumentParser

ROOT = Path(__file__).parents[1]
# Each takes seconds to import.
SLOW = ("torch", "timm", "torchvision", "matplotlib", "numpy")
COMMAND_LINES = [
    *(["ecoformer", command] for command in COMMANDS),
    *(["ecoformer", "tables", "main"], ["ecoformer", "plots", "cost"]),
    *(["pvt.main"], ["twins.main"], ["pvt.get_energy"], ["twins.get_energy"]),
]


def run(module: str, *words: str) -> tuple[int, str, str, set[str]]:
    """Exit code, output, errors and imported modules of ``python -m MODULE WORDS``."""
    program = (
        "import json, runpy, sys\n"
        f"sys.argv = {['-', *words]}\n"
        f"try:\n    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n"
        "    print('\\n' + json.dumps([stop.code or 0, *sys.modules]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    output, _, report = result.stdout.rstrip().rpartition("\n")
    code, *modules = json.loads(report)
    return code, output, result.stderr, set(modules)


@pytest.mark.parametrize("line", COMMAND_LINES, ids=" ".join)
def test_help_is_there_at_once(line: list[str]) -> None:
    code, output, errors, modules = run(*line, "--help")
    assert (code, errors) == (0, "")
    assert output.startswith("usage: ")
    assert not modules & {*SLOW}
    if line[0] != "ecoformer":
        assert f"python -m {line[0]}" in output


@pytest.mark.parametrize("line", COMMAND_LINES, ids=" ".join)
def test_wrong_flags_are_refused_at_once(line: list[str]) -> None:
    code, output, errors, modules = run(*line, "--no-such_flag")
    assert (code, output.strip()) == (2, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert not modules & {*SLOW}


def test_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        for name, (what, _) in COMMANDS.items():
            assert sum(line.split() == [name, *what.split()] for line in lines) == 1


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: unknown command 'trian', did you mean 'train'?"
    )
    assert main(["\x1b[2J"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command '\\x1b[2J'. ")


def test_it_is_installed_as_a_command() -> None:
    assert 'ecoformer = "ecoformer.__main__:main"' in (ROOT / "pyproject.toml").read_text()


def test_eval_is_train_with_eval(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--model", "pvt_v2_b0", "--data-set", "DIGITS", "--output_dir", str(tmp_path)]
    assert main(["eval", *words]) == 2
    assert "--eval needs weights" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--model", "alt_gvt_small"], ["--model=pvt_v2_b0"]])
def test_cost_of_any_model(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *flags, "--input_size", "64", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["model"] in flags[-1] and cost["input_size"] == [64, 64]


def test_a_command_that_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(argv: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ecoformer.tools.convert.main", interrupt)
    assert main(["convert"]) == 130
    assert capsys.readouterr().err == "error: interrupted.\n"


def test_flags_are_spelled_with_dashes_or_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(prog="x")
    sub = parser.add_subparsers(dest="what").add_parser("y")
    for target in (parser, sub):
        target.add_argument("--output-dir")
    for words in (["--output_dir", "a_b"], ["--output-dir=a_b"], ["--output_dir=a_b"]):
        assert parser.parse_args(words).output_dir == "a_b"
        assert parser.parse_args(["y", *words]).output_dir == "a_b"
    # What it does not know stays as it was typed, for whoever does.
    assert parser.parse_known_args(["--warmup_epoch=a_b"])[1] == ["--warmup_epoch=a_b"]
    for words in (["--output", "a"], ["--output_dir"], ["--no\x1b"], ["z"]):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(words)
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert "x --help tells of all flags" in error and error[:-1].isprintable()


def test_public_names() -> None:
    names: dict[str, object] = {}
    exec("from ecoformer import *", names)
    for name in public.__all__:
        assert names[name] is getattr(ecoformer, name)
        assert name in dir(ecoformer)
    assert ecoformer.ops.encode is ecoformer.encode
    assert not hasattr(ecoformer, "no_such_name")
    assert not hasattr(ecoformer, "__no_such_name__")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ecoformer {ecoformer.__version__}\n"
