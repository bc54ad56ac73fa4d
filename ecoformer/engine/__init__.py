"""Training, evaluation and speed of a model, on one process or many."""

from __future__ import annotations
