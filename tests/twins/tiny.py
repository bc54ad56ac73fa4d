"""Twins of a few channels, for what does not depend on size."""

from __future__ import annotations

from twins.variants import TwinsVariant

TINY_SVT = TwinsVariant(embed_dims=(4, 8, 16, 32), num_heads=(2, 2, 4, 4), has_windows=True)
TINY_PCPVT = TwinsVariant(embed_dims=(4, 8, 16, 32), num_heads=(1, 2, 4, 8))
