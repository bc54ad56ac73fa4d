"""The ways in which the one operator of ``ecoformer.ops`` can be computed."""

from __future__ import annotations
