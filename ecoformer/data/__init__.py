"""Samples to train and to evaluate on, in an order and with noise that a run can repeat."""

from __future__ import annotations

from ecoformer.data.digits import write_digits_folder
from ecoformer.data.loaders import Loader, Loaders, build_loaders, load_splits

__all__ = ["Loader", "Loaders", "build_loaders", "load_splits", "write_digits_folder"]
