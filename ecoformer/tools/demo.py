"""Tell the whole story on real handwritten digits, in minutes: ``ecoformer demo``.

It writes the embedded digits as an image folder, trains a small softmax model from nothing,
fine-tunes it with EcoFormer attention as ImageNet is trained, evaluates both, and leaves one table
and one picture. It runs from a clone, whose ``configs/demo`` it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ecoformer.config.arguments import ArgumentParser
from ecoformer.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    InputError,
    NonFiniteError,
    Preempted,
    print_error,
)

if TYPE_CHECKING:
    from ecoformer.cost import Cost
    from ecoformer.engine.run import Run

_CONFIGS = Path(__file__).parents[2] / "configs" / "demo"
# Variant and image side of each backbone: what two cores train in minutes.
_MODELS = {"pvt": ("pvt_v2_b0", 64), "twins": ("alt_gvt_small", 48)}
_DIGIT_SIZE = 64
_BATCH_SIZE = 32
_LEAST_TOP1 = 97.0
_MAX_TOP1_DROP = 1.0


@dataclass(frozen=True)
class Result:
    """What one stage of the demo gave.

    Args:
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

    Returns:
        The process's exit code: 1 if the accuracy falls short, 2 bad input, 3 non-finite, 75
        preempted and saved, else 0.
    """
    parser = ArgumentParser(
        prog="ecoformer demo",
        description="Train softmax and EcoFormer attention on real digits and compare them.",
    )
    parser.add_argument("--backbone", choices=sorted(_MODELS), default="pvt")
    parser.add_argument("--output-dir", type=Path, default=None, help="default: runs/demo_BACKBONE")
    args = parser.parse_args(argv)
    folder = args.output_dir or Path("runs", f"demo_{args.backbone}")
    variant, input_size = _MODELS[args.backbone]
    try:
        results = _measure(_train(variant, folder), input_size)
        picture = folder / "demo.png"
        _draw(results, picture)
    except (InputError, NonFiniteError, Preempted) as error:
        print_error(error)
        return error.exit_code
    print(f"\n{variant}, {input_size} px, 360 held-out digits\n\n{_format_table(results)}\n")
    print(f"curves and energy: {picture}")
    softmax_top1, ecoformer_top1 = (result.curve[-1] for result in results)
    if softmax_top1 < _LEAST_TOP1 or ecoformer_top1 < softmax_top1 - _MAX_TOP1_DROP:
        print_error(
            f"expected softmax of at least {_LEAST_TOP1} % and EcoFormer at most {_MAX_TOP1_DROP} "
            "point below it; something is broken here."
        )
        return EXIT_FAILED
    return EXIT_DONE


def _train(variant: str, folder: Path) -> list[Run]:
    """Train and evaluate both stages."""
    if not _CONFIGS.is_dir():
        raise InputError(f"{_CONFIGS} is missing; run the demo from a clone of the repository.")
    # Here, so that --help and a wrong flag answer at once.
    from ecoformer.data import write_digits_folder
    from ecoformer.engine.state import LAST_CHECKPOINT
    from ecoformer.tools.runs import run_evaluation, run_training

    data = write_digits_folder(folder / "digits", size=_DIGIT_SIZE)
    runs = []
    start: dict[str, object] = {}
    for kind in ("msa", "ecoformer"):
        settings = {
            "config": str(_CONFIGS / f"{variant}_{kind}.py"),
            "data_path": str(data),
            "data_set": "IMNET",
        }
        output = {"output_dir": str(folder / kind), "resume": None}
        runs.append(run_training({**settings, **start, **output}))
        # The weights after the last epoch: choosing the best would peek at the held-out images.
        last = str(folder / kind / LAST_CHECKPOINT)
        run_evaluation({**settings, "resume": last})
        start = {"finetune": last}
    return runs


def _measure(runs: Sequence[Run], input_size: int) -> list[Result]:
    import torch

    from ecoformer.attention import attention_class
    from ecoformer.cost import count_cost
    from ecoformer.tools.measure import measure_rates

    device = next(runs[0].model.parameters()).device
    images = torch.randn(_BATCH_SIZE, 3, input_size, input_size, device=device)
    labels = [attention_class(str(run.config.model.attn_type)).label for run in runs]
    rates = measure_rates(
        {label: run.model for label, run in zip(labels, runs, strict=True)}, images
    )
    return [
        Result(
            label,
            [record["test_acc1"] for record in run.log],
            count_cost(run.model, input_size),
            rates[label],
        )
        for label, run in zip(labels, runs, strict=True)
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
    """Draw the curves of both stages in a row, and energy against accuracy."""
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
