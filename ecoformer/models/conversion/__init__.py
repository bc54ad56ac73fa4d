"""Softmax attention of other people's models turned into EcoFormer layers, in place."""

from __future__ import annotations

# The table is made of these.
from ecoformer.models.conversion import timm_forms, torch_forms, transformers_forms  # noqa: F401
from ecoformer.models.conversion.convert import convert
from ecoformer.models.conversion.forms import Form, find_form, register_form
from ecoformer.models.conversion.layer import ConvertedAttention
from ecoformer.models.conversion.report import ConversionReport

__all__ = [
    "ConversionReport",
    "ConvertedAttention",
    "Form",
    "convert",
    "find_form",
    "register_form",
]
