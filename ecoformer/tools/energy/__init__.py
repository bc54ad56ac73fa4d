"""What a model costs, layer by layer."""

from __future__ import annotations
