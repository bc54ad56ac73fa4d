"""Learned binary hash functions: their settings, their module and their fit."""

from __future__ import annotations

from ecoformer.hashing.calibration import (
    fit_hash_functions,
    hash_layers,
    with_random_hash_functions,
)
from ecoformer.hashing.fit import HashFit, fit_hash
from ecoformer.hashing.kernel_hash import KernelHash

__all__ = [
    "HashFit",
    "KernelHash",
    "fit_hash",
    "fit_hash_functions",
    "hash_layers",
    "with_random_hash_functions",
]
