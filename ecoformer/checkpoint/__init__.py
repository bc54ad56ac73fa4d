"""Weight files: safe reading, atomic writing, the released layout, and earlier stages."""

from __future__ import annotations

from ecoformer.checkpoint.files import read_checkpoint, save_atomic
from ecoformer.checkpoint.layout import export_released
from ecoformer.checkpoint.load import LoadReport, load_checkpoint
from ecoformer.checkpoint.zoo import resolve_source

__all__ = [
    "LoadReport",
    "export_released",
    "load_checkpoint",
    "read_checkpoint",
    "resolve_source",
    "save_atomic",
]
