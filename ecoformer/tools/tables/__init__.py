"""The paper's tables, and our own, by one command each."""

from __future__ import annotations
