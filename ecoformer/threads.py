"""How the threads of one process wait for each other."""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Let threads of OpenMP sleep where they wait for each other; before PyTorch is imported.

    By default they spin, and beside other jobs they spin away the time of the thread that they
    wait for: ``ecoformer benchmark threads`` measures it. A policy that is set already stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
