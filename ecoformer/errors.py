"""Errors that a person can act on, the exit code that each becomes, and how they are printed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130

# Longer than any sentence of ours; what is longer holds a name out of somebody's file.
_MAX_CHARACTERS = 2000


class InputError(ValueError):
    """Something that a user gave is wrong; one line says what, and what to do."""

    exit_code = EXIT_BAD_INPUT


class NonFiniteError(ArithmeticError):
    """A loss, gradient, weight or hash function became NaN or infinite.

    Args:
        step: of the epoch, where it is not the last one that was done.
        loss_scale: that the step had.
    """

    exit_code = EXIT_NON_FINITE

    def __init__(
        self, message: str, *, step: int | None = None, loss_scale: float | None = None
    ) -> None:
        super().__init__(message)
        self.step = step
        self.loss_scale = loss_scale


class Preempted(Exception):
    """The run was asked to stop, and has saved what it needs to go on."""

    exit_code = EXIT_PREEMPTED


def one_line(message: object) -> str:
    """Make text safe to print, whoever wrote it: names in files can hold anything.

    White space becomes single spaces, and what a terminal would obey (escape sequences, bells,
    changes of direction) or cannot encode (bytes of a name) an escape. The middle of what is
    longer than 2,000 characters is left out.
    """
    # Twice: the first bounds the time, and escapes are longer than what they stand for.
    text = _shorten(" ".join(str(message).split()))
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _shorten("".join(escaped))


def describe_error(error: BaseException) -> str:
    """Write the type and the message, if there is one, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _shorten(text: str) -> str:
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"


class LineFormatter(logging.Formatter):
    """Write what is logged as one line each."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """Write the message alone; a traceback keeps its lines."""
        return one_line(record.message)


@contextmanager
def print_records(is_shown: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Print what the package logs inside a block, where it is to be shown, to stdout alone."""
    logger = logging.getLogger("ecoformer")
    handlers, propagate, level = logger.handlers, logger.propagate, logger.level
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LineFormatter())
    handler.addFilter(is_shown)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def print_error(message: object) -> None:
    """Say on stderr, in one line, why a command ends."""
    print("error:", one_line(message), file=sys.stderr, flush=True)


def suggest(name: str, choices: Iterable[str]) -> str:
    """End a sentence about an unknown name: ``", did you mean 'x'?"``, or ``"."``."""
    # Imported here: only a failing command pays for it.
    import difflib

    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else "."


def is_main_process() -> bool:
    """Tell from torchrun's environment whether this process speaks to the user."""
    return os.environ.get("RANK", "0") == "0"
