"""The settings of a run: what they are, where they come from, and how they are kept."""

from __future__ import annotations

from ecoformer.config.cli import parse_config
from ecoformer.config.file import read_config, to_yaml
from ecoformer.config.merge import make_config
from ecoformer.config.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    describe_changes,
)

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "describe_changes",
    "make_config",
    "parse_config",
    "read_config",
    "to_yaml",
]
