"""Spellings of the released scripts: what they are called here, and what became of the rest."""

from __future__ import annotations

import logging

from ecoformer.config.schema import field_types
from ecoformer.errors import InputError, is_main_process, suggest

_logger = logging.getLogger(__name__)

# Released flag or configuration key -> field.
SPELLINGS = {
    "nbits": "num_bits",
    "anchor": "num_anchors",
    "m": "num_anchors",
    "topk": "num_similar",
    "k": "refit_every_epochs",
    "dr": "decay_rate",
    "throughout": "throughput",
}

# Released names that nothing reads any more -> what to tell those who still give them.
WITHOUT_MEANING = {
    "dist_eval": "evaluation is always shared between ranks, and exact",
    "cooldown_epochs": "a run lasts exactly --epochs",
    "resplit": "it concerns augmentation splits, which no flag makes",
    "p": "nothing reads it",
    "world_size": "torchrun sets it",
    "dist_url": "torchrun sets it",
    "local_rank": "torchrun sets it",
    "use_mcloader": "there is one loader",
    "fp32_resume": "a resumed run keeps its gradient scale",
    "inat_category": "lay the data out as IMNET",
    "stage3_alpha": "nothing reads it",
    "num_features": "Performer takes D ln D features",
}

# What the released scripts of a package built where neither file nor flag names an attention.
ATTENTION = {"pvt": "sra"}


def find_field(spelling: str) -> str | None:
    """Return the field that a released or present spelling means.

    Args:
        spelling: a key of a file, or a flag with its dashes; ``-`` and ``_`` are the same.

    Returns:
        None for a released name without a meaning, which is said in the log.

    Raises:
        InputError: nothing has that name; the nearest one is shown.
    """
    is_flag = spelling.startswith("--")
    name = spelling.removeprefix("--").replace("-", "_")
    name = SPELLINGS.get(name, name)
    if name in WITHOUT_MEANING:
        if is_main_process():
            _logger.warning(
                "%s has no meaning any more and is ignored: %s.", spelling, WITHOUT_MEANING[name]
            )
        return None
    if name not in field_types():
        kind, names = "field", [*field_types(), *SPELLINGS]
        if is_flag:
            kind, names = "flag", ["--" + name.replace("_", "-") for name in names]
        raise InputError(f"unknown {kind} {spelling}{suggest(spelling, names)}")
    return name
