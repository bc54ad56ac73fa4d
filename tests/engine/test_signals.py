"""What a signal does to a process that trains."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ecoformer.engine.signals import STOP_SIGNALS, Request, agree, leave_at_signal, stop_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_is_a_wish_until_it_is_asked_for(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    with stop_signals():
        assert agree() == Request.NONE
        os.kill(os.getpid(), number)
        assert agree() == Request.STOP
    assert agree() == Request.NONE
    assert signal.getsignal(number) == handler


def test_long_wait_is_left_at_once() -> None:
    with stop_signals():
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        began = time.monotonic()
        assert leave_at_signal(lambda: time.sleep(30)) is None
        assert time.monotonic() - began < 10
        signal.signal(signal.SIGALRM, previous)


def test_second_ctrl_c_ends_where_it_is() -> None:
    with stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert agree() == Request.STOP
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_save_is_agreed_where_it_is_due() -> None:
    assert agree(is_save_due=True) == Request.SAVE
