"""Gather what a page tells of runs: their table, their curves, what they cost, their codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ecoformer.cost import count_cost
from ecoformer.cost.executed import count_executed
from ecoformer.engine.resume import FREE_FIELDS
from ecoformer.engine.run import Run, load_run
from ecoformer.errors import InputError
from ecoformer.models.registry import find_family
from ecoformer.tools.energy.description import find_image_size
from ecoformer.tools.figures import to_svg
from ecoformer.tools.plots.codes import Pair, draw_codes
from ecoformer.tools.plots.curves import draw_cost, draw_curves, draw_points, find_measure
from ecoformer.tools.report.page import Picture, Section
from ecoformer.tools.table import Column, Value
from ecoformer.tools.tables.costs import EXECUTED_NOTE, add_savings, cost_columns
from ecoformer.tools.tables.seeds import SEEDS_NOTE, describe_seeds, seed_columns

# Where they differ, runs are of one kind all the same. Whether there are weights or a teacher to
# begin with tells kinds apart, and not where those lie; other folders may hold other data.
_OF_A_RUN = {"seed", *FREE_FIELDS} - {"data_path"}
_GIVEN = ("finetune", "teacher")
_RESOLUTIONS = (32, 64, 128, 224, 448, 1024)
_SOFTMAX = "msa"


@dataclass(frozen=True)
class Group:
    """Runs of the same settings, by seed.

    Args:
        attention: kind or layout.
        variant: of the backbone.
    """

    name: str
    variant: str
    attention: str
    runs: dict[int, Run]

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))

    def results(self, measure: str) -> dict[int, float]:
        """Seed to what was measured after the last epoch, by its key in the log."""
        return {seed: run.log[-1][measure] for seed, run in self.runs.items()}


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """Open runs and put seeds together; softmax attention comes first.

    Raises:
        InputError: one is no run on images, or two are alike even in their seed.
    """
    groups: dict[str, Group] = {}
    for folder in folders:
        run = load_run(folder)
        flat = run.config.to_flat()
        settings = {name: value for name, value in flat.items() if name not in _OF_A_RUN}
        key = repr((settings, [bool(flat[name]) for name in _GIVEN]))
        model = run.config.model
        family = find_family(model.model)
        if family.inputs != "images":
            raise InputError(
                f"{folder} is a run on {family.inputs}, and a report counts what an image costs; "
                "leave it out, and draw its curves by ecoformer plots curves."
            )
        variant, attention = family.resolve(model.model, model.attn_type)
        group = groups.setdefault(key, Group(folder.resolve().name, variant, attention, {}))
        seed = run.config.run.seed
        if seed in group.runs:
            raise InputError(
                f"{folder} and {group.runs[seed].folder} have the same settings and seed; give one."
            )
        group.runs[seed] = run
    return sorted(groups.values(), key=lambda group: group.attention != _SOFTMAX)


def write_sections(
    folders: Sequence[Path], images: Sequence[int] | None = None
) -> Iterator[Section]:
    """Write all parts of the page.

    Args:
        images: numbers of validation images, for codes; three, spread evenly, where None.

    Raises:
        InputError: a run, its data or an image is not there.
    """
    # First: it reads all logs, and refuses what has none.
    measure, title = find_measure(folders)
    name = title.removesuffix(" %")
    curves = Picture(
        to_svg(draw_curves(folders), "curves"),
        f"Training loss and {name} on the validation images after each epoch.",
    )
    groups = read_groups(folders)
    rows = _describe(groups, measure)
    yield _write_table(groups, rows, title)
    yield Section("Training", [curves])
    yield Section(
        "Energy against accuracy",
        [
            Picture(
                to_svg(draw_points(rows, title), "tradeoff"),
                f"Arithmetic of one image in the paper's 45 nm model; {name} after the last "
                "epoch, with its 95 % interval where there are seeds.",
            )
        ],
    )
    yield _write_costs(groups)
    yield _write_codes(groups, images)


def _describe(groups: Sequence[Group], measure: str) -> list[dict[str, Value]]:
    rows: list[dict[str, Value]] = []
    for group in groups:
        run = group.first
        size = find_image_size(run.config)
        cost = count_cost(run.model, size)
        row: dict[str, Value] = {
            "name": group.name,
            "model": group.variant,
            "attention": find_family(group.variant).label(group.attention),
            "data": run.config.data.data_set,
            "input_size": size[0] if size[0] == size[1] else f"{size[0]} x {size[1]}",
            "epochs": len(run.log),
            **describe_seeds(group.results(measure), groups[0].results(measure) if rows else None),
            "parameters": cost.num_parameters,
            "mul": cost.mul,
            "add": cost.add,
            "energy_pj": cost.energy_pj,
            "traffic_bytes": cost.traffic_bytes(),
            "executed": count_executed(run.model, size),
        }
        if rows:
            add_savings(row, rows[0])
        rows.append(row)
    return rows


def _write_table(groups: Sequence[Group], rows: Sequence[dict[str, Value]], title: str) -> Section:
    is_small = max(float(row["energy_pj"] or 0) for row in rows) < 1e9
    columns = (
        Column("name", "run"),
        Column("model", "model"),
        Column("attention", "attention"),
        Column("data", "data"),
        Column("input_size", "px", ".0f"),
        Column("epochs", "epochs", ".0f"),
        *seed_columns(title),
        *cost_columns(is_small=is_small),
        Column("traffic_bytes", "moved MB", ".1f", 1e6),
    )
    notes = [
        f"{EXECUTED_NOTE} Moved: weights, inputs and outputs of each layer, of one image alone, in "
        "float32 and with softmax fused."
    ]
    if any(len(group.runs) > 1 for group in groups) or len(rows) > 1:
        notes.insert(0, SEEDS_NOTE)
    return Section("Runs", table=(columns, rows), notes=notes)


def _write_costs(groups: Sequence[Group]) -> Section:
    pictures, notes = [], []
    for variant in dict.fromkeys(group.variant for group in groups):
        try:
            figure = draw_cost(variant, _RESOLUTIONS)
        except InputError as error:  # a model for one size of images
            notes.append(f"No curve of {variant}: {error}")
            continue
        pictures.append(
            Picture(
                to_svg(figure, f"cost-{variant}"),
                f"Arithmetic of one image through {variant}, with a classifier, by attention kind, "
                "in the paper's 45 nm model, with the published hash settings; both axes are "
                "logarithmic.",
            )
        )
    return Section("Cost against resolution", pictures, notes=notes)


def _write_codes(groups: Sequence[Group], images: Sequence[int] | None) -> Section:
    title = "Codes, and the attention that they imply"
    try:
        pair = _find_pair(groups)
    except InputError as error:
        return Section(title, notes=[f"No codes: {error}"])
    if pair is None:
        needs = (
            "Codes are drawn where a run with softmax and one with EcoFormer attention, of the "
            "same model, data and image size, are given."
        )
        return Section(title, notes=[needs])
    if images is None:
        num_images = len(pair.images)
        # Neighbours are often of one class.
        images = sorted({num_images * part // 6 for part in (1, 3, 5)})
    return Section(
        title,
        [
            Picture(
                to_svg(draw_codes(pair, index=index), f"codes-{index}"),
                f"Validation image {index}. Each small map is a bit of the codes of all tokens. "
                "The square marks one token; then how many bits others share with it, and the "
                "weights that it gives to their values through codes and under softmax. Heads are "
                "averaged.",
            )
            for index in images
        ],
    )


def _find_pair(groups: Sequence[Group]) -> Pair | None:
    """Find the first run with codes that has a softmax peer, of its own seed if there is one."""
    for ours in groups:
        for theirs in groups:
            kinds = (theirs.attention, ours.attention)
            alike = [
                (g.variant, g.first.config.model.input_size, g.first.config.data.data_set)
                for g in (ours, theirs)
            ]
            if kinds == (_SOFTMAX, "ecoformer") and alike[0] == alike[1]:
                seed, run = next(iter(ours.runs.items()))
                return Pair.of(theirs.runs.get(seed, theirs.first), run)
    return None
