"""The command ``ecoformer plots``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ecoformer.config.arguments import ArgumentParser
from ecoformer.errors import EXIT_DONE, InputError, print_error
from ecoformer.tools.energy.flags import add_silicon_flags

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one picture; returns the process's exit code, 0 done or 2 bad input."""
    options = _parse(argv)
    path = options.output or Path("runs", "plots", f"{options.plot}.png")
    try:
        if path.suffix != ".png":
            raise InputError(f"--output {path}: pictures are PNG; name it {path.stem}.png.")
        # Brings matplotlib along, and most drawings torch, for which --help need not wait.
        from ecoformer.tools.figures import save_figure

        save_figure(_draw(options), path)
    except InputError as error:
        print_error(error)
        return error.exit_code
    print(f"wrote {path}")
    return EXIT_DONE


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="ecoformer plots",
        description="Draw a picture of runs, tables or codes, as PNG.",
        epilog="PLOT --help tells the flags of each. A run is a folder that training has left.",
    )
    plots = parser.add_subparsers(dest="plot", metavar="PLOT", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        plot = plots.add_parser(name, help=help, description=help)
        plot.add_argument(
            "--output", type=Path, metavar="FILE.png", help=f"(runs/plots/{name}.png)"
        )
        return plot

    curves = add("curves", "loss and accuracy over epochs, a line a run")
    curves.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    tradeoff = add("tradeoff", "accuracy against energy, a point a row of tables")
    tradeoff.add_argument(
        "tables",
        nargs="+",
        type=Path,
        metavar="TABLE.json",
        help="of ecoformer tables, with accuracies",
    )
    cost = add("cost", "energy against resolution, a line an attention kind")
    cost.add_argument("--model", default="pvt_v2_b0", help="backbone (%(default)s)")
    sides = (32, 64, 128, 224, 448, 1024)
    cost.add_argument(
        "--resolutions", type=int, nargs="+", default=sides, help="pixels %(default)s"
    )
    energy = add("energy", "arithmetic on paper, as executed, and memory")
    energy.add_argument("--model", default="pvt_v2_b0", help="backbone (%(default)s)")
    energy.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        default=(224, 512, 1024),
        metavar="PIXELS",
        help="%(default)s",
    )
    add_silicon_flags(energy)
    codes = add("codes", "what one token attends to under softmax and under codes")
    for kind in ("softmax", "ecoformer"):
        codes.add_argument(
            f"--{kind}", type=Path, required=True, metavar="RUN", help=f"with {kind} attention"
        )
    codes.add_argument(
        "--image", type=int, default=0, help="number of a validation image (%(default)s)"
    )
    codes.add_argument("--layer", help="name of an attention layer (the first with codes)")
    codes.add_argument(
        "--token", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="of its map (the middle)"
    )
    predictions = add("predictions", "what is detected or segmented in held-out images")
    predictions.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    predictions.add_argument(
        "--images", type=int, nargs="+", default=(0, 1, 2, 3), help="numbers %(default)s"
    )
    add("method", "the method, drawn")
    return parser.parse_args(argv)


def _draw(options: argparse.Namespace) -> Figure:
    if options.plot in ("curves", "tradeoff", "cost"):
        from ecoformer.tools.plots import curves

        if options.plot == "curves":
            return curves.draw_curves(options.runs)
        if options.plot == "tradeoff":
            return curves.draw_tradeoff(options.tables)
        _check_sides(options.resolutions, "--resolutions")
        return curves.draw_cost(options.model, options.resolutions)
    if options.plot == "codes":
        from ecoformer.engine.run import load_run
        from ecoformer.tools.plots.codes import Pair, draw_codes

        return draw_codes(
            Pair.of(load_run(options.softmax), load_run(options.ecoformer)),
            index=options.image,
            layer=options.layer,
            token=options.token,
        )
    if options.plot == "predictions":
        from ecoformer.engine.run import load_run
        from ecoformer.tools.plots.predictions import draw_predictions

        return draw_predictions([load_run(run) for run in options.runs], options.images)
    if options.plot == "energy":
        from ecoformer.cost.prices import find_prices
        from ecoformer.tools.plots.energy import draw_energy

        _check_sides(options.input_size, "--input-size")
        prices = find_prices(options.node, options.precision)
        return draw_energy(options.model, options.input_size, prices)
    from ecoformer.tools.plots.method import draw_method

    return draw_method()


def _check_sides(sides: Sequence[int], flag: str) -> None:
    if min(sides) < 32:
        raise InputError(f"{flag} start at 32 pixels, of which the last stage sees 1.")
