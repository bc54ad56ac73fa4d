"""EcoFormer: linear attention through learned binary codes.

Paper: EcoFormer, Liu et al., NeurIPS 2022, arXiv 2209.09004.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ecoformer.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """Import the public names when one is asked for: PyTorch takes seconds, help needs none."""
        if name == "__all__" or not name.startswith("_"):
            public = import_module(f"{__name__}.public")
            if hasattr(public, name):
                return getattr(public, name)
            # The packages that hold them, as ecoformer.ops, are imported by now.
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module(f"{__name__}.public").__all__})
