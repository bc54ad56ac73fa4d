"""The ways to compute ``kernelized_hash_attention``. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ecoformer.errors import InputError, suggest
from ecoformer.ops.backends.base import Backend, ComposedBackend, FusedBackend, HashFunctions
from ecoformer.ops.backends.blocked import BlockedBackend
from ecoformer.ops.backends.composed import EagerBackend, ReferenceBackend
from ecoformer.ops.backends.native import NativeBackend
from ecoformer.ops.backends.triton import TritonBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "ComposedBackend",
    "FusedBackend",
    "HashFunctions",
    "default_backend",
    "find_backend",
    "find_fused_backend",
    "forced_backend",
    "use_backend",
]

# In order of preference.
BACKENDS: list[Backend] = [
    TritonBackend(),
    NativeBackend(),
    BlockedBackend(),
    EagerBackend(),
    ReferenceBackend(),
]

# A plain global: compiled code has a guard on it, and compiles again where it changed.
_forced: Backend | None = None


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Choose a backend of ``BACKENDS`` in a block, for all threads.

    A gradient comes from the backend that its forward had, also after the block.

    Raises:
        InputError: an unknown name; in the block, inputs that the backend cannot run on.
    """
    global _forced
    backend, before = find_backend(name), _forced
    _forced = backend
    try:
        yield backend
    finally:
        _forced = before


def forced_backend() -> Backend | None:
    """Return what the innermost ``use_backend`` chose, if any."""
    return _forced


def find_backend(name: str) -> Backend:
    """Look a backend up; an unknown name is an InputError."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    names = [backend.name for backend in BACKENDS]
    raise InputError(
        f"the backends are {', '.join(names)}; there is no {name!r}{suggest(name, names)}"
    )


def find_fused_backend(name: str, q: Tensor, v: Tensor, functions: HashFunctions) -> FusedBackend:
    """Take the fused backend of a name, or the first that can run where the name is empty.

    Raises:
        InputError: the named one cannot run on these inputs.
    """
    if name:
        backend = find_backend(name)
        assert isinstance(backend, FusedBackend)
        backend.require(q, v, functions)
        return backend
    for backend in BACKENDS:
        if isinstance(backend, FusedBackend) and backend.can_run(q, v, functions):
            return backend
    raise AssertionError("the blocked backend runs everywhere")


def default_backend(device: torch.device) -> FusedBackend:
    """Find what attends to rows of usual size on a device, where no backend is named."""
    row, weight = torch.empty(1, 1, 1, 32, device=device), torch.empty(1, 16, 25, device=device)
    return find_fused_backend("", row, row, HashFunctions(row[0], weight, weight[:, 0]))
