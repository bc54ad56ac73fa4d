"""Learned binary hash functions: their module and their fit."""

from __future__ import annotations

from ecoformer.hashing.calibration import (
    find_statistics,
    fit_hash_functions,
    hash_layers,
    with_random_hash_functions,
)
from ecoformer.hashing.fit import HashFit, fit_hash
from ecoformer.hashing.kernel_hash import KernelHash
from ecoformer.hashing.targets import SimilarityTargets

__all__ = [
    "HashFit",
    "KernelHash",
    "SimilarityTargets",
    "find_statistics",
    "fit_hash",
    "fit_hash_functions",
    "hash_layers",
    "with_random_hash_functions",
]
