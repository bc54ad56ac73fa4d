"""Learned binary hash functions: their settings, their module and their fit."""

from __future__ import annotations

from ecoformer.hash_config import HashConfig
from ecoformer.hashing.calibration import (
    fit_hash_functions,
    hash_layers,
    with_random_hash_functions,
)
from ecoformer.hashing.fit import HashFit, fit_hash
from ecoformer.hashing.kernel_hash import KernelHash
from ecoformer.hashing.targets import SimilarityTargets

__all__ = [
    "HashConfig",
    "HashFit",
    "KernelHash",
    "SimilarityTargets",
    "fit_hash",
    "fit_hash_functions",
    "hash_layers",
    "with_random_hash_functions",
]
