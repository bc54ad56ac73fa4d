"""What attention, fit, models and training steps cost in time and memory, beside their peers."""

from __future__ import annotations
