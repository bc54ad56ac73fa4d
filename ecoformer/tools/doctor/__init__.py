"""Look at all that a run needs, before it needs it."""

from __future__ import annotations
