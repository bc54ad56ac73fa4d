"""The command ``ecoformer tables``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ecoformer.config.arguments import ArgumentParser
from ecoformer.config.schema import field_types
from ecoformer.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    InputError,
    NonFiniteError,
    Preempted,
    print_error,
)
from ecoformer.tools.energy.flags import add_silicon_flags

if TYPE_CHECKING:
    import torch

    from ecoformer.tools.table import Column, Row, Table, Value

    # Columns, rows and notes.
    _Content = tuple[Sequence[Column], Sequence[Row], Sequence[str]]

_PROG = "ecoformer tables"
# Title of each table, and what --help says of it.
_TABLES = {
    "paper": (
        "Tables and figures of the paper, and where they stand here",
        "an index: published, ours, how it came about, and the command that fills each row",
    ),
    "main": (
        "Published models, ImageNet-1k",
        "cost beside softmax attention; accuracy with --data-path, speed with --throughput",
    ),
    "energy": (
        "Energy, modelled and measured",
        "the paper's energy beside what is executed, as additions or not, memory, and joules",
    ),
    "kinds": ("Attention kinds under one recipe", "cost, speed, accuracy after two stages"),
    "bits": ("Bits of a code", "EcoFormer by bits, under the same recipe"),
    "anchors": ("Anchors", "EcoFormer by anchors, likewise"),
    "similar": ("Similar pairs a token", "EcoFormer by similar pairs a token, likewise"),
    "pairs": ("PAIRS", "kinds, bits, anchors and distillation, where attention matters"),
    "conversion": ("A ViT of timm, converted", "before, right after, fine-tuned, distilled"),
    "bias": ("Form of the constant term", "EcoFormer by its constant term, likewise"),
    "sequences": (
        "Long sequences in a short protocol",
        "kinds on ListOps and Pathfinder in few steps, published figures apart",
    ),
    "scenes": (
        "Detection and segmentation of SCENES",
        "softmax, and EcoFormer made of it: AP and mIoU",
    ),
}
# Of tables with data and a network of their own.
_DEFAULTS: dict[str, dict[str, object]] = {
    "pairs": {
        "model": "vit_canvas",
        "data_set": "PAIRS",
        "input_size": 48,
        "batch_size": 64,
        "epochs": [64, 8],
        "seeds": [0, 1, 2],
    },
    "conversion": {
        "model": "test_vit",
        "input_size": 96,
        "epochs": [20, 4],
        "seeds": [0, 1, 2],
    },
}
_EPILOG = """\
TABLE --help tells the flags of each. A table is printed, and written as Markdown, CSV and JSON.
What is done already is not done again: runs go on where they stopped, and evaluated weights are
found in accuracy.csv.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Make one table: print it, and write it as Markdown, CSV and JSON.

    Returns:
        The process's exit code: 0 done, 2 bad input, 3 non-finite, 75 preempted and saved, 130
        interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    options = _parse(words)
    try:
        _check_sizes(options)
        table = _make(options, f"{_PROG} {shlex.join(words)}")
        name = _name_file(options)
        table.write(options.output_dir, name)
    except (InputError, NonFiniteError, Preempted) as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print_error("interrupted; what is done is kept, and the same command goes on.")
        return EXIT_INTERRUPTED
    print(f"{table.to_markdown()}\n\nwrote {options.output_dir / name}.md, .csv, .json")
    return EXIT_DONE


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=_PROG, description="Make the paper's tables, and our own.", epilog=_EPILOG
    )
    tables = parser.add_subparsers(dest="table", metavar="TABLE", required=True)
    for name, (title, content) in _TABLES.items():
        table = tables.add_parser(name, help=content, description=f"{title}: {content}.")
        table.add_argument(
            "--output-dir",
            type=Path,
            default=Path("runs", "tables"),
            metavar="FOLDER",
            help="for table and runs (%(default)s)",
        )
        if name == "paper":
            table.add_argument(
                "--results",
                type=Path,
                default=Path(".github", "results"),
                metavar="FOLDER",
                help="of tables that were made, as JSON (%(default)s)",
            )
            continue
        table.add_argument("--device", help="cuda, cpu ... (CUDA if there is one)")
        if name == "sequences":
            _add_sequences(table)
            continue
        if name == "scenes":
            _add_scenes(table)
            continue
        table.add_argument("--batch-size", type=int, default=32, help="images a step (%(default)s)")
        if name == "main":
            _add_data(table, default="IMNET")
            table.add_argument(
                "--weights",
                nargs="+",
                default=[],
                metavar="MODEL/ATTENTION=SOURCE",
                help="what to evaluate: path, URL or zoo name; all of the zoo unless given",
            )
            table.add_argument(
                "--throughput",
                action="store_true",
                help="time each model here; what throughput.csv holds is not timed again",
            )
            table.add_argument(
                "--time-budget",
                type=float,
                default=30,
                metavar="MINUTES",
                help="for --throughput (%(default)s)",
            )
            continue
        if name == "energy":
            _add_energy(table)
            continue
        table.add_argument("--model", default="pvt_v2_b0", help="backbone (%(default)s)")
        table.add_argument("--input-size", type=int, default=32, help="pixels (%(default)s)")
        _add_data(table, default="DIGITS")
        table.add_argument(
            "--values", nargs="+", default=[], help="of the setting, instead of the usual"
        )
        _add_seeds(table, [0])
        _add_stages(table, [8, 4])
        table.add_argument(
            "--no-train", action="store_true", help="costs and speed only, no accuracy"
        )
        table.set_defaults(**_DEFAULTS.get(name, {}))
    return parser.parse_args(words)


def _add_energy(table: argparse.ArgumentParser) -> None:
    table.add_argument(
        "--model",
        nargs="+",
        default=["pvt_v2_b0"],
        help="backbones; all for every variant (%(default)s)",
    )
    table.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        default=[224, 512, 1024],
        metavar="PIXELS",
        help="(%(default)s)",
    )
    add_silicon_flags(table)
    table.add_argument(
        "--measure",
        action="store_true",
        help="joules, where the machine tells them: 70 seconds a row",
    )


def _add_sequences(table: argparse.ArgumentParser) -> None:
    table.add_argument(
        "--data-set",
        nargs="+",
        choices=("LISTOPS", "PATHFINDER"),
        default=["LISTOPS", "PATHFINDER"],
        help="(both)",
    )
    table.add_argument(
        "--configs",
        type=Path,
        default=Path("configs", "sequence"),
        metavar="FOLDER",
        help="of the full protocols, which are cut (%(default)s)",
    )
    for flag, default, meaning in (
        ("--epochs", 10, "after each the rate falls"),
        ("--steps", 100, "of an epoch"),
        ("--eval-samples", 1000, "held-out sequences to evaluate on"),
    ):
        table.add_argument(flag, type=int, default=default, help=f"{meaning} (%(default)s)")
    _add_seeds(table, [0, 1, 2])


def _add_scenes(table: argparse.ArgumentParser) -> None:
    table.add_argument("--model", default="pvt_v2_b0", help="backbone (%(default)s)")
    table.add_argument(
        "--short-side", type=int, default=128, metavar="PIXELS", help="of a canvas (%(default)s)"
    )
    table.add_argument("--batch-size", type=int, default=8, help="canvases a step (%(default)s)")
    _add_stages(table, [5, 2])
    table.add_argument("--steps", type=int, default=128, help="of an epoch (%(default)s)")
    _add_seeds(table, [0, 1, 2])


def _add_stages(table: argparse.ArgumentParser, default: list[int]) -> None:
    table.add_argument(
        "--epochs",
        type=int,
        nargs=2,
        default=default,
        metavar=("STAGE1", "STAGE2"),
        help="(%(default)s)",
    )


def _add_seeds(table: argparse.ArgumentParser, default: list[int]) -> None:
    table.add_argument(
        "--seeds", type=int, nargs="+", default=default, help="a run each (%(default)s)"
    )


def _add_data(table: argparse.ArgumentParser, default: str) -> None:
    table.add_argument("--data-path", help="folder of the data; DIGITS and PAIRS need none")
    table.add_argument(
        "--data-set",
        choices=get_args(field_types()["data_set"]),
        default=default,
        help="(%(default)s)",
    )


def _check_sizes(options: argparse.Namespace) -> None:
    for name, least in (
        ("batch_size", 1),
        ("input_size", 32),
        ("epochs", 1),
        ("steps", 1),
        ("eval_samples", 1),
    ):
        given = getattr(options, name, least)
        if min(given if isinstance(given, list) else [given]) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}.")


def _name_file(options: argparse.Namespace) -> str:
    """Name the files of a table; one at other prices lies beside the paper's."""
    if options.table == "energy" and (options.node, options.precision) != ("45nm", "float32"):
        return f"energy_{options.node}_{options.precision}"
    name: str = options.table
    return name


def _make(options: argparse.Namespace, command: str) -> Table:
    # These bring torch along, which --help need not wait for.
    from ecoformer.engine.launch import choose_device
    from ecoformer.tools.measure import describe_environment
    from ecoformer.tools.table import Table

    device = choose_device(getattr(options, "device", "cpu"))
    environment = describe_environment(command, device)
    makers = {
        "paper": _make_paper,
        "main": _make_main,
        "energy": _make_energy,
        "sequences": _make_sequences,
        "scenes": _make_scenes,
    }
    make = makers.get(options.table, _make_ablation)
    title, _ = _TABLES[options.table]
    return Table(title, *make(options, device), environment)


def _make_paper(options: argparse.Namespace, device: torch.device) -> _Content:
    from ecoformer.tools.tables.paper import PAPER_COLUMNS, PAPER_NOTES, Results, describe_paper

    if not options.results.is_dir():
        raise InputError(f"--results {options.results}: no such folder; run it from a clone.")
    return PAPER_COLUMNS, describe_paper(Results(options.results)), PAPER_NOTES


def _make_main(options: argparse.Namespace, device: torch.device) -> _Content:
    from ecoformer.tools.measure import describe_hardware
    from ecoformer.tools.tables import published
    from ecoformer.tools.tables.throughput import Timed, time_models

    # First: it is what can be refused.
    accuracies = _evaluate(options, device)
    rows = published.describe_models()
    for row in rows:
        row |= accuracies.get(str(row["name"]), {})
    if not options.throughput:
        return published.MAIN_COLUMNS, rows, published.MAIN_NOTES
    how = Timed(options.batch_size, device, describe_hardware(device), options.time_budget)
    speeds = time_models(published.list_sizes(), how, options.output_dir / "throughput.csv")
    for row in rows:
        row |= {key: value for key, value in speeds[str(row["name"])].items() if key not in row}
    note = (
        f"images/s: batches of {options.batch_size} on {how.hardware}. Softmax and EcoFormer "
        "attention of a model take turns, at least five batches each, or one where it takes more "
        "than four seconds, and the median counts. The load is the machine's when a model was "
        "done; more than the threads means that others were at work."
    )
    return published.MAIN_COLUMNS, rows, [*published.MAIN_NOTES, note]


def _evaluate(options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Value]]:
    """Measure the accuracies that were asked for, by the names of their rows."""
    from ecoformer.tools.tables.accuracy import Validation, evaluate_models
    from ecoformer.tools.tables.published import choose_weights

    weights = choose_weights(options.weights)
    if not options.data_path:
        if options.weights:
            raise InputError("--weights are there to be evaluated; give --data-path too.")
        return {}
    validation = Validation(
        data_set=options.data_set,
        data_path=options.data_path,
        batch_size=options.batch_size,
        device=device,
    )
    return evaluate_models(weights, validation, options.output_dir / "accuracy.csv")


def _make_energy(options: argparse.Namespace, device: torch.device) -> _Content:
    from ecoformer.cost.prices import find_prices
    from ecoformer.models.registry import list_variants
    from ecoformer.tools.tables.energy import add_joules, describe_energy, energy_columns

    prices = find_prices(options.node, options.precision)
    models = list_variants() if options.model == ["all"] else options.model
    rows, notes = describe_energy(
        models, input_sizes=options.input_size, batch_size=options.batch_size, prices=prices
    )
    joules = add_joules(
        rows, batch_size=options.batch_size, device=device, is_asked=options.measure
    )
    return energy_columns(prices), rows, [*notes, joules]


def _make_sequences(options: argparse.Namespace, device: torch.device) -> _Content:
    from ecoformer.tools.tables import sequences

    protocol = sequences.ShortProtocol(
        configs=options.configs,
        epochs=options.epochs,
        steps=options.steps,
        eval_samples=options.eval_samples,
        device=device,
        folder=options.output_dir / "sequences",
    )
    data_sets = list(dict.fromkeys(options.data_set))
    rows = sequences.run_sequences(data_sets, protocol, options.seeds)
    notes = sequences.describe_protocol(data_sets, protocol, rows)
    return sequences.SEQUENCE_COLUMNS, rows, notes


def _make_scenes(options: argparse.Namespace, device: torch.device) -> _Content:
    from ecoformer.tools.tables import scenes

    protocol = scenes.SceneProtocol(
        variant=options.model,
        side=options.short_side,
        epochs=tuple(options.epochs),
        steps=options.steps,
        batch_size=options.batch_size,
        device=device,
        folder=options.output_dir / "scenes",
    )
    rows = scenes.run_scenes(protocol, options.seeds)
    return scenes.SCENE_COLUMNS, rows, scenes.describe_scenes(protocol, rows)


def _make_ablation(options: argparse.Namespace, device: torch.device) -> _Content:
    from ecoformer.tools.tables import ablations
    from ecoformer.tools.tables.recipe import Recipe

    recipe = Recipe(
        variant=options.model,
        data_set=options.data_set,
        data_path=options.data_path,
        input_size=options.input_size,
        epochs=tuple(options.epochs),
        batch_size=options.batch_size,
        device=device,
        folder=options.output_dir / f"{options.data_set}_{options.input_size}px_{options.model}",
    )
    arms = ablations.list_arms(options.table, options.model, options.values)
    rows = ablations.run_ablation(arms, recipe, [] if options.no_train else options.seeds)
    return ablations.ABLATION_COLUMNS, rows, ablations.describe_recipe(recipe, rows)
