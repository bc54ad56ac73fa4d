"""The one place where settings are merged and completed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ecoformer.config.file import blame_file, read_fields
from ecoformer.config.recipes import TASK_RECIPES
from ecoformer.config.released import ATTENTION
from ecoformer.config.schema import Config, DistillationConfig
from ecoformer.errors import InputError, is_main_process
from ecoformer.hash_config import HashConfig
from ecoformer.models.registry import ModelFamily, find_default_family, find_family

_logger = logging.getLogger(__name__)


def make_config(**values: object) -> Config:
    """Build the settings of a run in Python, as ``parse_config`` does from a command line.

    Args:
        values: fields by name; ``config`` names a file, whose fields they beat; ``hashing`` may
            be a ``HashConfig``, and a path may be a ``Path``.

    Raises:
        InputError: a field, file or value that cannot be used.
    """
    if isinstance(values.get("hashing"), HashConfig):
        values |= vars(values.pop("hashing"))
    values = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in values.items()
    }
    # Before a model is missed: its name may be the one that is mistyped.
    Config.from_flat(values)
    return merge(values)


def merge(values: Mapping[str, object], family: ModelFamily | None = None) -> Config:
    """Lay values over the file that they name, and that over recipes and the defaults.

    The recipe of the task beats that of the family.
    """
    path = values.get("config")
    in_file = read_fields(str(path)) if path else {}
    given = {**in_file, **{name: value for name, value in values.items() if value}}
    task = str(given.get("task", Config().run.task))
    if family is None:
        model = given.get("model")
        family = find_family(str(model)) if model else find_default_family(task)
    recipe = {**family.recipe, **TASK_RECIPES.get(task, {})}
    config = Config.from_flat({"model": family.default_model, **recipe})
    if path:
        with blame_file(str(path)):
            config = Config.from_flat(in_file, config)
    config = Config.from_flat(values, config)
    if (
        "model" in values
        and "attn_type" not in values
        and config.model.model not in family.variants
    ):
        # A released name that spells its attention out beats the file's attn_type.
        config = replace(config, model=replace(config.model, attn_type=None))
    return _complete(config, family)


def _complete(config: Config, family: ModelFamily) -> Config:
    """Fill in what follows from other settings."""
    model, run = config.model, config.run
    _check_distillation(config.distillation)
    if run.compile_mode != "default" and not run.compile:
        raise InputError(f"--compile-mode {run.compile_mode} needs --compile; add it.")
    variant, attention = family.resolve(model.model, model.attn_type)
    if model.train_msa and attention not in ("msa", "lsa_msa"):
        if model.attn_type or model.model.endswith("_ecoformer"):
            whose = "the default model " if model.model == family.default_model else ""
            raise InputError(
                "--train_msa fine-tunes original weights into softmax attention, and "
                f"{whose}{model.model} is to have {attention!r}; name a softmax model with "
                "--model, or drop --train_msa."
            )
        variant, attention = family.resolve(variant, "msa")
    elif model.attn_type is None:
        _tell_attention(family, model.model, variant, attention)
    if run.config:
        name = Path(run.config).stem
    elif attention == family.resolve(model.model)[1]:
        name = model.model
    else:
        # Two stages of one model must not share a folder.
        name = f"{variant}_{attention}"
    return replace(
        config,
        model=replace(model, model=variant, attn_type=attention),
        run=replace(run, output_dir=run.output_dir or f"runs/{name}"),
    )


def _check_distillation(settings: DistillationConfig) -> None:
    """Refuse flags that mean nothing without one another."""
    if settings.distill != "none" and settings.teacher is None:
        raise InputError(
            f"--distill {settings.distill} needs a teacher; give the softmax stage's checkpoint "
            "with --teacher."
        )
    if settings.distill == "none" and settings.teacher is not None:
        raise InputError(
            "--teacher is for distillation alone; add --distill output, logits or both, or start "
            "from those weights with --finetune."
        )
    for name in ("align_steps", "distill_weight"):
        value = getattr(settings, name)
        if value != getattr(DistillationConfig(), name) and not settings.compares_outputs:
            raise InputError(
                f"--{name.replace('_', '-')} {value} needs attention outputs to compare; add "
                "--distill output or both."
            )


def _tell_attention(family: ModelFamily, name: str, variant: str, attention: str) -> None:
    """Say what a model without an attention is taken for, where somebody may expect another."""
    default = family.variants[variant][0]
    released = ATTENTION.get(family.name)
    if name == variant and attention != default:
        expected = f", as released; {family.name}.create_model builds {default}"
    elif released in family.variants[variant] and released != attention:
        expected = f"; the released scripts built {released} (--attn_type {released})"
    else:
        return
    if is_main_process():
        _logger.info("%s without --attn_type: taken as %s%s", name, attention, expected)
