"""EcoFormer: linear attention through learned binary codes.

Paper: EcoFormer, Liu et al., NeurIPS 2022, arXiv 2209.09004.
"""

from __future__ import annotations

from ecoformer.attention import EcoFormerAttention
from ecoformer.checkpoint import LoadReport, export_released, load_checkpoint
from ecoformer.cost import count_cost
from ecoformer.errors import InputError, NonFiniteError
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import fit_hash, fit_hash_functions
from ecoformer.ops import encode, hash_attention, kernelized_hash_attention

__version__ = "0.1.0"

__all__ = [
    "EcoFormerAttention",
    "HashConfig",
    "InputError",
    "LoadReport",
    "NonFiniteError",
    "count_cost",
    "encode",
    "export_released",
    "fit_hash",
    "fit_hash_functions",
    "hash_attention",
    "kernelized_hash_attention",
    "load_checkpoint",
]
