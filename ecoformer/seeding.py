"""Random numbers as a function of where a run stands, never of how it got there.

A sample's augmentation, a step's mixup and drop path are seeded anew from (seed, epoch,
position). A resumed run, or one with other data workers, therefore draws the same numbers
without any generator state being saved.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Mix what a draw depends on, e.g. ``("sample", seed, epoch, position)``, into one seed.

    Returns:
        A number in [0, 2**63), the same on every platform and Python version.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def seed_host(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators of the CPU."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # The default generator alone: torch.manual_seed would also visit every device.
    torch.default_generator.manual_seed(seed)


@contextmanager
def restored_generators() -> Iterator[None]:
    """Give the global generators of the CPU the states back that they had before a block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators inside a block and restore them after it."""
    with restored_generators():
        seed_host(seed)
        yield
