"""What attention, fit, models and training steps cost in time and memory, beside their peers.

Run as ``python -m ecoformer.tools.benchmark``; ``--help`` tells the rest.
"""

from __future__ import annotations
