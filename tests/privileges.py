"""Reading and writing as all but the superuser do, who may open anything."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of Linux: opening whatever the modes of files say.
_OPEN_ANYTHING = 1 << 1 | 1 << 2
_VERSION_3 = 0x20080522


@contextmanager
def without_privileges() -> Iterator[None]:
    """Obey the modes of files in a block, in this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    # Effective, permitted and inheritable ones, then those beyond the first 32.
    capabilities = (ctypes.c_uint32 * 6)()

    def check(code: int) -> None:
        if code:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.capget(header, capabilities))
    effective = capabilities[0]
    capabilities[0] = effective & ~_OPEN_ANYTHING
    check(libc.capset(header, capabilities))
    try:
        yield
    finally:
        capabilities[0] = effective
        check(libc.capset(header, capabilities))
