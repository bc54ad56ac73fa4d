"""The commands beside training: what ``ecoformer COMMAND`` runs."""

from __future__ import annotations
