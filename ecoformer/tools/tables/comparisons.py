"""Attention kinds, and settings of the hash functions, compared under one recipe."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ecoformer.data.datasets import open_dataset
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import with_random_hash_functions
from ecoformer.tools.measure import time_interleaved
from ecoformer.tools.tables.models import (
    EXECUTED_NOTE,
    add_savings,
    cost_columns,
    describe_cost,
    find_family,
)
from ecoformer.tools.tables.recipe import Recipe
from ecoformer.tools.tables.report import Column, Value

COMPARISON_COLUMNS = (
    Column("name", "attention"),
    Column("start", "stage 1"),
    Column("epochs", "epochs", digits=0),
    Column("top1", "top-1 %"),
    Column("top1_std", "std"),
    Column("num_seeds", "seeds", digits=0),
    *cost_columns(is_small=True),
    Column("images_per_s", "images/s", digits=0),
)
# Setting that a comparison varies, and the values that it takes unless others are given.
_SETTINGS: dict[str, tuple[str, tuple[int, ...] | tuple[str, ...]]] = {
    "bits": ("num_bits", (4, 8, 16, 32)),
    "anchors": ("num_anchors", (5, 10, 25, 50)),
    "similar": ("num_similar", (1, 5, 10, 25)),
    "bias": ("value_bias", ("released", "normalized")),
}
COMPARISONS = ("kinds", *_SETTINGS)
_TIMED_BATCH = 32


@dataclass(frozen=True)
class Contender:
    """One row of a comparison.

    Args:
        name: what it is called.
        attention: its kind.
        hashing: settings of ``HashConfig`` that are not the default.
    """

    name: str
    attention: str
    hashing: dict[str, int | str] = field(default_factory=dict)

    @property
    def config(self) -> HashConfig:
        """All settings of its hash functions."""
        return HashConfig(**self.hashing)  # type: ignore[arg-type]


def list_contenders(comparison: str, variant: str, values: Sequence[str] = ()) -> list[Contender]:
    """List what a comparison compares.

    Args:
        comparison: one of ``COMPARISONS``.
        variant: the backbone.
        values: of the setting that is varied, instead of the usual ones.

    Returns:
        Its rows; the first is what the others are set against.

    Raises:
        InputError: no such backbone, or a value that the setting cannot take.
    """
    family = find_family(variant)
    kinds = family.kinds(variant)
    if comparison == "kinds":
        if values:
            raise InputError("kinds takes no --values: it compares all that the model has.")
        # Softmax first, which the others are set against, and EcoFormer beside its other bias.
        ordered = sorted(kinds, key=lambda kind: (kind != "msa", kind == "ecoformer"))
        plain = [Contender(family.label(kind), kind) for kind in ordered]
        normalized = Contender(
            "EcoFormer, normalized bias", "ecoformer", {"value_bias": "normalized"}
        )
        return [*plain, normalized]
    setting, usual = _SETTINGS[comparison]
    default = getattr(HashConfig(), setting)
    contenders = []
    for value in values or usual:
        try:
            typed = type(default)(value)
        except ValueError:
            raise InputError(f"--values {value}: {setting} is a whole number.") from None
        hashing = {} if typed == default else {setting: typed}
        contender = Contender(f"{setting} {typed}", "ecoformer", hashing)
        # Refuses what no hash function can have.
        _ = contender.config
        contenders.append(contender)
    return contenders


def compare(
    contenders: Sequence[Contender], recipe: Recipe, seeds: Sequence[int]
) -> list[dict[str, Value]]:
    """Train all contenders, or what is left of it, and describe them.

    Args:
        contenders: from ``list_contenders``.
        recipe: what they share.
        seeds: of the runs; none: costs and speed alone.

    Returns:
        Rows for ``COMPARISON_COLUMNS``, and the accuracy after each epoch of each seed.

    Raises:
        InputError: the data cannot be used.
        CommandFailed: a run failed, and has said why.
    """
    images = open_dataset(recipe.data_set, recipe.data_path, "val", input_size=recipe.input_size)
    num_classes = len(images.class_names)
    curves: dict[str, dict[int, list[float]]] = {contender.name: {} for contender in contenders}
    # The first seed is complete before the second begins.
    for seed in seeds:
        for contender in contenders:
            records = recipe.train(contender.attention, seed, contender.hashing)
            curves[contender.name][seed] = [record["test_acc1"] for record in records]
    speeds = _measure_speeds(contenders, recipe, num_classes)
    rows: list[dict[str, Value]] = []
    for contender in contenders:
        row: dict[str, Value] = {"name": contender.name, "images_per_s": speeds[contender.name]}
        row |= describe_cost(
            recipe.variant,
            contender.attention,
            input_size=recipe.input_size,
            num_classes=num_classes,
            hashing=contender.config,
        )
        if rows:
            add_savings(row, rows[0])
        if seeds:
            row |= {"start": recipe.parent(contender.attention), "epochs": sum(recipe.epochs)}
            row |= _describe_accuracy(curves[contender.name])
        rows.append(row)
    return rows


def describe_recipe(recipe: Recipe, rows: Sequence[dict[str, Value]]) -> list[str]:
    """Tell a reader how a comparison was made.

    Args:
        recipe: what its rows share.
        rows: from ``compare``.

    Returns:
        Notes to stand below the table.
    """
    notes = [
        f"{recipe.variant}, {recipe.data_set}, {recipe.input_size} px. Costs are of one image of "
        "this size; savings are against the first row. images/s: evaluation, in batches of "
        f"{_TIMED_BATCH}, all rows in turns, so that a busy machine slows all alike.",
        EXECUTED_NOTE,
    ]
    if any("top1" in row for row in rows):
        first, second = recipe.epochs
        notes.insert(
            1,
            f"One recipe, {first} + {second} epochs for every row: stage 1 from nothing, stage 2 "
            "at a quarter of its rate. What softmax weights convert to starts from one softmax "
            "stage 1 a seed; other kinds have a stage 1 of their own. Accuracy is that after the "
            "last epoch, over all validation images; std is over seeds. So short a training "
            "compares kinds, and says little of what they reach in the end.",
        )
    return notes


def _describe_accuracy(curves: dict[int, list[float]]) -> dict[str, Value]:
    last = [curve[-1] for curve in curves.values()]
    row: dict[str, Value] = {"top1": statistics.mean(last), "num_seeds": len(last)}
    if len(last) > 1:
        row["top1_std"] = statistics.stdev(last)
    for seed, curve in curves.items():
        row[f"top1_by_epoch_seed{seed}"] = " ".join(f"{top1:.2f}" for top1 in curve)
    return row


def _measure_speeds(
    contenders: Sequence[Contender], recipe: Recipe, num_classes: int
) -> dict[str, float]:
    """Images a second; speed needs no trained weights."""
    side, device = recipe.input_size, recipe.device
    images = torch.randn(_TIMED_BATCH, 3, side, side, device=device)
    create_model = find_family(recipe.variant).create_model
    models = {}
    for contender in contenders:
        model = create_model(
            recipe.variant,
            contender.attention,
            num_classes=num_classes,
            hashing=contender.config,
        )
        models[contender.name] = with_random_hash_functions(model).to(device).eval()
    with torch.inference_mode():
        timings = time_interleaved(
            {name: partial(model, images) for name, model in models.items()},
            num_rounds=20,
            device=device,
        )
    return {name: _TIMED_BATCH * 1e3 / timing.median_ms for name, timing in timings.items()}
