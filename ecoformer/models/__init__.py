"""What backbones are made of, and the registry of model families.

Letters here: B batch, N tokens = height * width, C channels.
"""

from __future__ import annotations
