"""Images for training and evaluation, in an order and with noise that a run can repeat."""

from __future__ import annotations

from ecoformer.data.digits import write_digits_folder
from ecoformer.data.loaders import Loader, Loaders, build_loaders

__all__ = ["Loader", "Loaders", "build_loaders", "write_digits_folder"]
