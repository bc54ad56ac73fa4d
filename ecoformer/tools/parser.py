"""Read the command lines of the tools."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ecoformer.errors import EXIT_BAD_INPUT, print_error


class Parser(argparse.ArgumentParser):
    """Take ``-`` and ``_`` in flags for the same, flags only whole, and refuse in one line."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **settings)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_spell(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; {self.prog} --help tells of all flags.")
        raise SystemExit(EXIT_BAD_INPUT)


def _spell(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
