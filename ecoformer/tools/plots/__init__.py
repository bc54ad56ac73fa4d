"""Pictures of runs, tables, costs and codes."""

from __future__ import annotations
