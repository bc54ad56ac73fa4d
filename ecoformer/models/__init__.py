"""What backbones are made of, and the registry of model families."""

from __future__ import annotations
