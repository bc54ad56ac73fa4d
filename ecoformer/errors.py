"""Errors that a person can act on, and the exit code that each becomes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class InputError(ValueError):
    """Something that a user gave is wrong; one line says what, and what to do."""

    exit_code = EXIT_BAD_INPUT


class NonFiniteError(ArithmeticError):
    """A loss, gradient, weight or hash function became NaN or infinite.

    Args:
        message: one line.
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


def print_error(message: object) -> None:
    """Say on stderr, in one line, why a command ends.

    Args:
        message: an error, or what stands in for one.
    """
    print("error:", *str(message).split(), file=sys.stderr, flush=True)


def suggest(name: str, choices: Iterable[str]) -> str:
    """End a sentence about an unknown name with the closest one that exists.

    Args:
        name: what was typed.
        choices: the names that exist.

    Returns:
        ``", did you mean 'x'?"``, or ``"."`` where nothing comes close.
    """
    # Imported here: only a failing command pays for it.
    import difflib

    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else "."


def is_main_process() -> bool:
    """Tell from torchrun's environment whether this process speaks to the user.

    Returns:
        True for rank 0, and where there is no torchrun.
    """
    return os.environ.get("RANK", "0") == "0"
