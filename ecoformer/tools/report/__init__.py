"""One page about runs that opens anywhere."""

from __future__ import annotations
