"""Signals that mean stop: noticed at once, obeyed by all ranks together between two steps.

A wait for data, a fit or an evaluation, which can be done again, is left right away. A second
Ctrl-C ends the process where it is.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import TypeVar

from ecoformer.ranks import is_main, max_over_ranks

T = TypeVar("T")

STOP_SIGNALS = (
    *(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT),
    # A terminal that was closed, and Ctrl-\.
    *(signal.SIGHUP, signal.SIGQUIT),
)
# Those that nohup, and shells for what they run in the background, have ignored.
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGQUIT)


class Request(IntEnum):
    """What a run does before its next step; the largest of all ranks' wishes."""

    NONE = 0
    SAVE = 1
    STOP = 2
    FAIL = 3


class _Leave(BaseException):
    """No ``Exception``: readers of images catch those."""


# Of the process, as its signals are.
_is_stop_asked = False
_may_leave = False


@contextmanager
def stop_signals() -> Iterator[None]:
    """Take signals as a wish to stop, which ``agree`` reports; in the main thread only."""
    global _is_stop_asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _is_stop_asked = False
    previous = {
        number: signal.signal(number, _note)
        for number in STOP_SIGNALS
        if number not in _MAY_BE_IGNORED or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None stands for a handler that was not set from Python, and is lost.
            signal.signal(number, handler or signal.SIG_DFL)
        _is_stop_asked = False


def _note(number: int, frame: FrameType | None) -> None:
    global _is_stop_asked, _may_leave
    if number == signal.SIGINT and _is_stop_asked:
        raise KeyboardInterrupt
    _is_stop_asked = True
    if _may_leave:
        _may_leave = False
        raise _Leave


def leave_at_signal(action: Callable[[], T]) -> T | None:
    """Do something, but leave it, wherever it is, when a signal comes or has come.

    The action must change nothing that is needed afterwards.

    Returns:
        What it returned; None where it was left, and ``agree`` then says ``STOP``.
    """
    global _may_leave
    try:
        # In two layers: a signal may come in the innermost one's end too.
        try:
            _may_leave = True
            return None if _is_stop_asked else action()
        finally:
            _may_leave = False
    except _Leave:
        return None


def agree(*, is_save_due: bool = False, is_failed: bool = False) -> Request:
    """Settle what all ranks do next: fail where one has, else stop or save.

    A rank that was told to stop, or one that failed, decides for all; a save is due where rank 0
    says so. Every rank must ask. The devices go on meanwhile.
    """
    wish = Request.SAVE if is_save_due and is_main() else Request.NONE
    wish = Request.STOP if _is_stop_asked else wish
    wish = Request.FAIL if is_failed else wish
    return Request(max_over_ranks(wish))
