"""Command lines of the tools: two spellings of a flag, and one line that refuses another."""

from __future__ import annotations

import pytest

from ecoformer.tools.parser import Parser


@pytest.fixture
def parser() -> Parser:
    parser = Parser("ecoformer x")
    part = parser.add_subparsers(dest="part", required=True).add_parser("part")
    part.add_argument("--output-dir", default="runs")
    part.add_argument("names", nargs="*")
    return parser


@pytest.mark.parametrize("flag", ["--output-dir", "--output_dir"])
def test_both_spellings_are_the_same(parser: Parser, flag: str) -> None:
    for words in ([flag, "a_b"], [f"{flag}=a_b"]):
        assert parser.parse_args(["part", "under_score", *words]).output_dir == "a_b"
    assert parser.parse_args(["part", "under_score"]).names == ["under_score"]


@pytest.mark.parametrize("words", [["part", "--output-di", "x"], ["path"], [], ["part", "--out"]])
def test_what_it_does_not_know_is_refused_in_one_line(
    parser: Parser, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "ecoformer x" in line and "--help" in line
