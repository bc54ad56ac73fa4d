"""EcoFormer: linear attention through learned binary codes.

Paper: EcoFormer, Liu et al., NeurIPS 2022, arXiv 2209.09004.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_HOMES = {
    "EcoFormerAttention": "attention",
    "HashConfig": "hash_config",
    "InputError": "errors",
    "LoadReport": "checkpoint",
    "NonFiniteError": "errors",
    "count_cost": "cost",
    "encode": "ops",
    "export_released": "checkpoint",
    "fit_hash": "hashing",
    "fit_hash_functions": "hashing",
    "hash_attention": "ops",
    "kernelized_hash_attention": "ops",
    "load_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> object:
    # Help and wrong flags are answered without PyTorch, whose import takes seconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
