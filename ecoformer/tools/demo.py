"""The whole story on real handwritten digits, in minutes: ``ecoformer demo``.

It writes the embedded digits as an image folder, trains a small softmax model from nothing,
fine-tunes it with EcoFormer attention by the commands that ImageNet takes, evaluates both, and
leaves one table and one picture. It runs from a clone, whose ``configs/demo`` it uses.
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ecoformer.config.arguments import ArgumentParser
from ecoformer.errors import EXIT_DONE, EXIT_FAILED, InputError, print_error

if TYPE_CHECKING:
    from ecoformer.cost import Cost

_CONFIGS = Path(__file__).parents[2] / "configs" / "demo"
# Variant and image side of each backbone: what two cores train in minutes.
_MODELS = {"pvt": ("pvt_v2_b0", 64), "twins": ("alt_gvt_small", 48)}
_ATTENTION = {"msa": "softmax", "ecoformer": "EcoFormer"}
_DIGIT_SIZE = 64
_NUM_CLASSES = 10
_BATCH_SIZE = 32
_LEAST_TOP1 = 97.0
_LARGEST_LOSS = 1.0


@dataclass(frozen=True)
class Result:
    """What one stage of the demo gave.

    Args:
        attention: label of its attention.
        curve: top-1 on the held-out images after each epoch, percent.
        cost: of one image.
        images_per_s: median rate of evaluation.
    """

    attention: str
    curve: list[float]
    cost: Cost
    images_per_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: the words after the program's name; ``sys.argv`` if not given.

    Returns:
        The process's exit code: that of the first command that fails; 1 if the accuracy falls
        short; else 0.
    """
    parser = ArgumentParser(
        prog="ecoformer demo",
        description="Train softmax and EcoFormer attention on real digits and compare them.",
    )
    parser.add_argument("--backbone", choices=sorted(_MODELS), default="pvt")
    parser.add_argument("--output-dir", type=Path, default=None, help="default: runs/demo_BACKBONE")
    args = parser.parse_args(argv)
    folder = args.output_dir or Path("runs", f"demo_{args.backbone}")
    try:
        data = _prepare(folder)
    except InputError as error:
        print_error(error)
        return error.exit_code
    softmax, ecoformer = folder / "msa", folder / "ecoformer"
    variant, input_size = _MODELS[args.backbone]
    common = ["--data-path", str(data), "--data-set", "IMNET"]
    for run_folder, start in (
        (softmax, []),
        (ecoformer, ["--finetune", str(softmax / "last_checkpoint.pth")]),
    ):
        config = ["--config", str(_CONFIGS / f"{variant}_{run_folder.name}.py"), *common]
        output = ["--output_dir", str(run_folder)]
        # The weights after the last epoch: choosing the best would peek at the held-out images.
        last = ["--resume", str(run_folder / "last_checkpoint.pth")]
        for command in ([*config, *output, *start, "--resume", "none"], [*config, *last, "--eval"]):
            if code := _run(args.backbone, command):
                return code

    results = _measure(args.backbone, variant, input_size, folder)
    picture = folder / "demo.png"
    _draw(results, picture)
    print(f"\n{variant}, {input_size} px, 360 held-out digits\n\n{_format_table(results)}\n")
    print(f"curves and energy: {picture}")
    softmax_top1, ecoformer_top1 = (result.curve[-1] for result in results)
    if softmax_top1 < _LEAST_TOP1 or ecoformer_top1 < softmax_top1 - _LARGEST_LOSS:
        print_error(
            f"expected softmax of at least {_LEAST_TOP1} % and EcoFormer at most {_LARGEST_LOSS} "
            "point below it; something is broken here."
        )
        return EXIT_FAILED
    return EXIT_DONE


def _prepare(folder: Path) -> Path:
    """Write the digits; returns their folder."""
    if not _CONFIGS.is_dir():
        raise InputError(f"{_CONFIGS} is missing; run the demo from a clone of the repository.")
    # Here, so that --help and a wrong flag answer at once.
    from ecoformer.data import write_digits_folder

    return write_digits_folder(folder / "digits", size=_DIGIT_SIZE)


def _run(backbone: str, command: list[str]) -> int:
    """Say a command and run it, in this process: importing everything again takes seconds."""
    print(f"\n$ python -m {backbone}.main {shlex.join(command)}", flush=True)
    return importlib.import_module(f"{backbone}.main").main(command)


def _measure(backbone: str, variant: str, input_size: int, folder: Path) -> list[Result]:
    import torch

    from ecoformer.cost import count_cost
    from ecoformer.engine.logs import read_log
    from ecoformer.tools.measure import measure_rates

    create_model = importlib.import_module(backbone).create_model
    models = {kind: create_model(variant, kind, num_classes=_NUM_CLASSES) for kind in _ATTENTION}
    rates = measure_rates(models, torch.randn(_BATCH_SIZE, 3, input_size, input_size))
    return [
        Result(
            label,
            [record["test_acc1"] for record in read_log(folder / kind)],
            count_cost(models[kind], input_size),
            rates[kind],
        )
        for kind, label in _ATTENTION.items()
    ]


def _format_table(results: list[Result]) -> str:
    from ecoformer.tools.table import Column, Row, format_markdown

    columns = (
        Column("attention", "attention"),
        Column("top1", "top-1 %"),
        Column("mul", "#Mul M", ".1f", 1e6),
        Column("add", "#Add M", ".1f", 1e6),
        Column("energy_pj", "energy mJ", ".3f", 1e9),
        Column("images_per_s", "images/s", ".0f"),
    )
    rows: list[Row] = [
        {
            "attention": result.attention,
            "top1": result.curve[-1],
            "mul": result.cost.mul,
            "add": result.cost.add,
            "energy_pj": result.cost.energy_pj,
            "images_per_s": result.images_per_s,
        }
        for result in results
    ]
    return format_markdown(columns, rows)


def _draw(results: list[Result], picture: Path) -> None:
    """Curves of both stages, one after the other, and energy against accuracy."""
    from ecoformer.tools.figures import make_figure, save_figure

    figure, (curves, tradeoff) = make_figure(2, width=4.5)
    first_epoch = 1
    for result in results:
        epochs = range(first_epoch, first_epoch + len(result.curve))
        curves.plot(epochs, result.curve, marker="o", label=result.attention)
        first_epoch = epochs.stop
        energy_mj = result.cost.energy_pj / 1e9
        tradeoff.scatter(energy_mj, result.curve[-1], s=80, label=result.attention)
    curves.set(xlabel="epoch, both stages", ylabel="top-1 %", title="training")
    tradeoff.set(
        xlabel="energy an image, mJ (45 nm model)",
        ylabel="top-1 %",
        title="after the last epoch",
        xlim=(0, 1.2 * max(result.cost.energy_pj for result in results) / 1e9),
        # Less than a few points is a matter of single images.
        ylim=(min(95.0, *(result.curve[-1] for result in results)), 100.5),
    )
    for axes in (curves, tradeoff):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, picture)
