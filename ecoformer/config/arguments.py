"""The argument parser of every command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ecoformer.errors import EXIT_BAD_INPUT, print_error


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that takes ``--output_dir`` for ``--output-dir``, and no abbreviations.

    What is wrong with the words is one line, without the usage, and exit code 2.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spell(word) for word in words], namespace)

    def _spell(self, word: str) -> str:
        """Put ``-`` for ``_`` where that makes it a flag of this parser; others keep theirs."""
        flag, equals, value = word.partition("=")
        dashed = flag.replace("_", "-")
        known = self._option_string_actions
        return dashed + equals + value if flag not in known and dashed in known else word

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; {self.prog} --help tells of all flags.")
        raise SystemExit(EXIT_BAD_INPUT)
