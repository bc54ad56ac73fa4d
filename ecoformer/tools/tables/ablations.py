"""Attention kinds, and settings of the hash functions, under one recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ecoformer.data.datasets import open_dataset
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.models.registry import find_family
from ecoformer.tools.measure import measure_rates
from ecoformer.tools.table import Column, Row, Value
from ecoformer.tools.tables.costs import (
    EXECUTED_NOTE,
    add_savings,
    cost_columns,
    describe_cost,
)
from ecoformer.tools.tables.recipe import Recipe
from ecoformer.tools.tables.seeds import describe_curves, seed_columns, seed_notes

ABLATION_COLUMNS = (
    Column("name", "attention"),
    Column("start", "stage 1"),
    Column("epochs", "epochs", ".0f"),
    *seed_columns(),
    *cost_columns(is_small=True),
    Column("images_per_s", "images/s", ".0f"),
)
# Setting that an ablation varies, and the values that it takes unless others are given.
_SETTINGS: dict[str, tuple[str, tuple[int, ...] | tuple[str, ...]]] = {
    "bits": ("num_bits", (4, 8, 16, 32)),
    "anchors": ("num_anchors", (5, 10, 25, 50)),
    "similar": ("num_similar", (1, 5, 10, 25)),
    "bias": ("value_bias", ("released", "normalized")),
}
_FEW_ANCHORS = ("5", "25", "50")
# Nothing is learned but the hash functions.
_FIT_ALONE: dict[str, object] = {"epochs": 1, "lr": 0.0, "warmup_lr": 0.0, "min_lr": 0.0}
_TIMED_BATCH = 32


@dataclass(frozen=True)
class Arm:
    """One row of an ablation.

    Args:
        attention: its kind.
        hashing: settings of ``HashConfig`` that are not the default.
        fields: other settings of its stage 2.
    """

    name: str
    attention: str
    hashing: dict[str, int | str] = field(default_factory=dict)
    fields: dict[str, object] = field(default_factory=dict)

    @property
    def config(self) -> HashConfig:
        """All settings of its hash functions."""
        return HashConfig(**self.hashing)  # type: ignore[arg-type]


def list_arms(ablation: str, variant: str, values: Sequence[str] = ()) -> list[Arm]:
    """List the rows of an ablation; the first is what the others are set against.

    Args:
        ablation: ``"kinds"``, ``"bits"``, ``"anchors"``, ``"similar"`` or ``"bias"``; ``"pairs"``
            is the first three in one, and ``"conversion"`` softmax beside what is made of it.
        values: of the setting that is varied, instead of the usual ones.

    Raises:
        InputError: no such backbone, or a value that the setting cannot take.
    """
    family = find_family(variant)
    kinds = family.kinds(variant)
    if ablation not in _SETTINGS and values:
        raise InputError(f"{ablation} takes no --values: it compares all that the model has.")
    if ablation == "conversion":
        family.check(variant, "ecoformer")
        return [
            Arm(family.label("msa"), "msa"),
            Arm("EcoFormer, fitted alone", "ecoformer", fields=_FIT_ALONE),
            Arm("EcoFormer", "ecoformer"),
            Arm("EcoFormer, distilled", "ecoformer", fields={"distill": "output"}),
        ]
    if ablation == "pairs":
        # EcoFormer with nothing set stands in each of these: one row of it is enough.
        others = [*list_arms("bits", variant), *list_arms("anchors", variant, _FEW_ANCHORS)]
        return [
            *list_arms("kinds", variant),
            *(arm for arm in list_arms("conversion", variant) if arm.fields),
            *(replace(arm, name=f"EcoFormer, {arm.name}") for arm in others if arm.hashing),
        ]
    if ablation == "kinds":
        # Softmax first, which the others are set against, and EcoFormer beside its other bias.
        ordered = sorted(kinds, key=lambda kind: (kind != "msa", kind == "ecoformer"))
        return [
            *(Arm(family.label(kind), kind) for kind in ordered),
            Arm("EcoFormer, normalized bias", "ecoformer", {"value_bias": "normalized"}),
        ]
    setting, usual = _SETTINGS[ablation]
    default = getattr(HashConfig(), setting)
    arms = []
    for value in values or usual:
        try:
            typed = type(default)(value)
        except ValueError:
            raise InputError(f"--values {value}: {setting} is a whole number.") from None
        arm = Arm(f"{setting} {typed}", "ecoformer", {} if typed == default else {setting: typed})
        # Refuses what no hash function can have.
        _ = arm.config
        arms.append(arm)
    return arms


def run_ablation(
    arms: Sequence[Arm], recipe: Recipe, seeds: Sequence[int]
) -> list[dict[str, Value]]:
    """Train all arms, or what is left of it, and describe them.

    Args:
        seeds: of the runs; none: costs and speed alone.

    Returns:
        Rows for ``ABLATION_COLUMNS``, and the accuracy after each epoch of each seed.

    Raises:
        InputError, NonFiniteError, Preempted: see ``ecoformer.engine.run.train``.
    """
    images = open_dataset(recipe.data_set, recipe.data_path, "val", input_size=recipe.input_size)
    num_classes = len(images.class_names)
    curves: dict[str, dict[int, list[float]]] = {arm.name: {} for arm in arms}
    # The first seed is complete before the second begins.
    for seed in seeds:
        for arm in arms:
            records = recipe.train(arm.attention, seed, arm.hashing, arm.fields)
            curves[arm.name][seed] = [record["test_acc1"] for record in records]
    speeds = _measure_speeds(arms, recipe, num_classes)
    rows: list[dict[str, Value]] = []
    for arm in arms:
        row: dict[str, Value] = {"name": arm.name, "images_per_s": speeds[arm.name]}
        row |= describe_cost(
            recipe.variant,
            arm.attention,
            input_size=recipe.input_size,
            num_classes=num_classes,
            hashing=arm.config,
        )
        if rows:
            add_savings(row, rows[0])
        if seeds:
            row |= {"start": recipe.parent(arm.attention), "epochs": sum(recipe.epochs)}
            if "epochs" in arm.fields:
                row["epochs"] = recipe.epochs[0] + int(str(arm.fields["epochs"]))
            row |= describe_curves(curves[arm.name], curves[arms[0].name] if rows else {})
        rows.append(row)
    return rows


def describe_recipe(recipe: Recipe, rows: Sequence[Row]) -> list[str]:
    """Tell a reader how the rows of ``run_ablation`` were made, in notes below the table."""
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
            "last epoch, over all validation images. So short a training compares kinds, and says "
            "little of what they reach in the end.",
        )
    notes[2:2] = seed_notes(rows)
    return notes


def _measure_speeds(arms: Sequence[Arm], recipe: Recipe, num_classes: int) -> dict[str, float]:
    side, device = recipe.input_size, recipe.device
    create_model = find_family(recipe.variant).create_model
    models = {
        arm.name: create_model(
            recipe.variant,
            arm.attention,
            input_size=side,
            num_classes=num_classes,
            hashing=arm.config,
        ).to(device)
        for arm in arms
    }
    return measure_rates(models, torch.randn(_TIMED_BATCH, 3, side, side, device=device))
