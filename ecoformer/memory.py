"""Memory of this process that nothing is in."""

from __future__ import annotations

import ctypes


def give_memory_back() -> None:
    """Let the system have what was freed, where the C library is glibc, which keeps much of it."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
