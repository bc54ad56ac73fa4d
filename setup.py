"""Entry for tools that still look for it; everything stands in pyproject.toml."""

from __future__ import annotations

from setuptools import setup

setup()
