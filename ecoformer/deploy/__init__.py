"""Models as files that run without this package."""

from __future__ import annotations

from ecoformer.deploy.checking import Comparison, MismatchError
from ecoformer.deploy.exporting import ExportReport, export
from ecoformer.deploy.formats import FORMATS

__all__ = ["FORMATS", "Comparison", "ExportReport", "MismatchError", "export"]
