"""How the threads of one process wait for each other."""

from __future__ import annotations

import os


def limit_spinning() -> None:
    """Let threads of OpenMP spin less before they sleep; before PyTorch is imported.

    By default they spin 300,000 times where they wait, and beside other jobs take the time of the
    thread that they wait for. To sleep at once costs half as much again on quiet cores. What the
    user has set stays. ``ecoformer benchmark threads`` measures it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
