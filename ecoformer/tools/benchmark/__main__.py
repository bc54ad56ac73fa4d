"""The command ``python -m ecoformer.tools.benchmark``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from ecoformer.engine.launch import choose_device
from ecoformer.errors import EXIT_DONE, EXIT_FAILED, InputError, print_error
from ecoformer.files import write_text
from ecoformer.tools.benchmark.checks import Check, check_core
from ecoformer.tools.benchmark.compare import Setup
from ecoformer.tools.benchmark.cores import count_tokens, measure_attention, measure_attention_sweep
from ecoformer.tools.benchmark.fits import measure_fit
from ecoformer.tools.benchmark.goals import judge_comparison, judge_slopes
from ecoformer.tools.benchmark.models import measure_model
from ecoformer.tools.benchmark.report import MIN_POINTS, Report, Row
from ecoformer.tools.measure import (
    PeakMemory,
    copy_bandwidth,
    describe_environment,
    settle_allocator,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What each task measures, in the order in which it matters: a machine may be lent for minutes only.
_TASKS = {
    "readme": ("attention", "fit", "model"),
    "attention": ("attention",),
    "fit": ("fit",),
    "model": ("model",),
    "train": ("train",),
    "gpu": ("attention", "fit", "model", "train"),
}
# Image sides at which it does, in pixels.
_SIDES = {
    "attention": (224, 112, 448, 512, 1024),
    "fit": (224, 512),
    "model": (224, 448),
    "train": (224,),
}
_GPU_SIDES = _SIDES | {"model": (224, 512, 448)}
_EPILOG = """\
readme     attention cores, fit and evaluation at the sizes of the README (the default)
attention  every core at the first resolution, forward and with backward; then cores over all
           resolutions, B * N near 131,072, evaluation
fit        one layer's hash fit
model      evaluation of a backbone with every kind of attention, at each resolution
train      training steps of the same
gpu        all of it at the sizes that fill a GPU, models compiled; what matters most first

Each comparison is printed, and --json written, as soon as it is measured. Where attention cores are
timed, the shipped one is held against the reference first; `pytest -m gpu` tests it further.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print, and write what was asked for.

    Args:
        argv: the words after the program's name; ``sys.argv`` if not given.

    Returns:
        Exit code; 1 where the shipped core computes what it should not.
    """
    words = sys.argv[1:] if argv is None else argv
    options = _parse(words)
    try:
        return _run(options, words)
    except InputError as error:
        print_error(error)
        return error.exit_code


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ecoformer.tools.benchmark",
        description="Time and memory of EcoFormer beside its peers, measured in turns.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", nargs="?", choices=_TASKS, default="readme")
    parser.add_argument("--device", help="cuda or cpu; cuda where there is one")
    parser.add_argument("--dtype", choices=_DTYPES, help="float32; bfloat16 for gpu")
    parser.add_argument("--batch-size", type=int, help="8; 2 for fit; 128 and 32 for gpu")
    parser.add_argument("--resolutions", type=int, nargs="+", help="image sides in pixels")
    parser.add_argument("--model", default="pvt_v2_b0", help="variant of PVTv2")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="models by torch.compile"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves over N")
    return parser.parse_args(words)


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    device = choose_device(options.device)
    for name in ("rounds", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1.")
    if any(side < 32 for side in options.resolutions or ()):
        raise InputError("--resolutions start at 32 pixels: the model's last stage has 1/32 of it.")
    if options.plot:
        _check_plot(options)
    dtype = options.dtype or ("bfloat16" if options.task == "gpu" else "float32")
    command = shlex.join(["python", "-m", "ecoformer.tools.benchmark", *words])
    environment = describe_environment(command, device) | {"dtype": dtype}
    settle_allocator()
    report = Report(environment, copy_bandwidth(device))

    def tell(text: str = "", findings: Iterable[str] = ()) -> None:
        """Print and write what there is so far, which may be all that there will be."""
        lines = [text] if text else []
        for finding in findings:
            report.findings.append(finding)
            lines.append(finding)
        if lines:
            print(*lines, "", sep="\n", flush=True)
        if options.json:
            write_text(options.json, report.to_json())

    tell(report.describe_environment())
    with PeakMemory(device) as memory:
        setup = Setup(device, _DTYPES[dtype], options.rounds, memory)
        checks = list(_check(setup, options))
        tell(findings=map(str, checks))
        for rows in _measure(setup, options):
            report.rows.extend(rows)
            goals = judge_comparison(report, rows, device.type)
            tell(report.describe_comparison(rows), goals)
    tell(report.describe_slopes(), judge_slopes(report))
    if options.plot:
        report.draw(options.plot)
    return EXIT_DONE if all(check.is_passed for check in checks) else EXIT_FAILED


def _check_plot(options: argparse.Namespace) -> None:
    """Refuse a picture that could not be drawn once everything is measured."""
    path: Path = options.plot
    if path.suffix.lower() != ".png":
        raise InputError(f"--plot {path}: the picture is a PNG; give it a name that ends in .png.")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {path.parent}; make it first.")
    most = max(len(set(_sides(options, part))) for part in _TASKS[options.task])
    if most < MIN_POINTS:
        raise InputError(
            f"--plot draws curves over {MIN_POINTS} image sides or more, not {most}; "
            "give more --resolutions."
        )


def _sides(options: argparse.Namespace, part: str) -> Sequence[int]:
    return options.resolutions or (_GPU_SIDES if options.task == "gpu" else _SIDES)[part]


def _check(setup: Setup, options: argparse.Namespace) -> Iterator[Check]:
    """Of the first core that is timed, and of one that fills no tile."""
    if "attention" in _TASKS[options.task]:
        num_tokens = count_tokens(_sides(options, "attention")[0])
        for count in (num_tokens, num_tokens - 1):
            yield check_core(setup.device, setup.dtype, num_tokens=count)


def _measure(setup: Setup, options: argparse.Namespace) -> Iterator[list[Row]]:
    """Comparisons, one after the other."""
    is_gpu = options.task == "gpu"
    batch_size = options.batch_size or (128 if is_gpu else 8)
    for part in _TASKS[options.task]:
        sides = _sides(options, part)
        token_counts = [count_tokens(side) for side in sides]
        if part == "attention":
            yield from measure_attention(setup, batch_size=batch_size, num_tokens=token_counts[0])
            if len(sides) > 1:
                yield from measure_attention_sweep(setup, token_counts=sorted(token_counts))
        elif part == "fit":
            fit_batch_size = options.batch_size or (32 if is_gpu else 2)
            for num_tokens in token_counts:
                yield from measure_fit(setup, batch_size=fit_batch_size, num_tokens=num_tokens)
        else:
            for side in sides:
                yield from measure_model(
                    setup,
                    options.model,
                    batch_size=batch_size,
                    resolution=side,
                    is_training=part == "train",
                    is_compiled=is_gpu if options.compile is None else options.compile,
                )


if __name__ == "__main__":
    raise SystemExit(main())
