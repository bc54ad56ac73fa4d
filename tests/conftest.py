"""What every test shares: one thread, the golden data, and no GPU test without a GPU."""

from __future__ import annotations

import gc
import os

# Before torch is imported, and inherited by every process that a test starts: sums come out in
# one order on all machines, and ranks on one machine do not fight over its cores.
os.environ["OMP_NUM_THREADS"] = "1"
# No test opens a window.
os.environ["MPLBACKEND"] = "agg"

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of measured reference data; its README tells the origin of each file."""
    return Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def pytest_collection_finish() -> None:
    """Let later collections of garbage pass over all that was imported."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def give_memory_back() -> Iterator[None]:
    """Models are reference cycles, and the C library keeps what it once had: 4 GB in the end."""
    yield
    from ecoformer import memory

    gc.collect()
    memory.give_memory_back()
