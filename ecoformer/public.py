"""The names that ``import ecoformer`` offers, each from where it lives."""

from __future__ import annotations

from ecoformer.attention import EcoFormerAttention
from ecoformer.checkpoint import LoadReport, export_released, load_checkpoint
from ecoformer.config import make_config
from ecoformer.cost import count_cost
from ecoformer.deploy import export
from ecoformer.engine.run import evaluate, load_run, train
from ecoformer.errors import InputError, NonFiniteError
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import fit_hash, fit_hash_functions
from ecoformer.models.conversion import ConversionReport, convert
from ecoformer.ops import (
    encode,
    hash_attention,
    hash_attention_weights,
    kernelized_hash_attention,
    pack_codes,
    unpack_codes,
)

__all__ = [
    "ConversionReport",
    "EcoFormerAttention",
    "HashConfig",
    "InputError",
    "LoadReport",
    "NonFiniteError",
    "convert",
    "count_cost",
    "encode",
    "evaluate",
    "export",
    "export_released",
    "fit_hash",
    "fit_hash_functions",
    "hash_attention",
    "hash_attention_weights",
    "kernelized_hash_attention",
    "load_checkpoint",
    "load_run",
    "make_config",
    "pack_codes",
    "train",
    "unpack_codes",
]
