"""The command ``python -m ecoformer.benchmark``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from ecoformer.benchmark.checks import PASSED, check_core
from ecoformer.benchmark.compare import Setup
from ecoformer.benchmark.cores import measure_attention, measure_attention_sweep
from ecoformer.benchmark.fits import measure_fit
from ecoformer.benchmark.goals import judge_comparison, judge_slopes
from ecoformer.benchmark.models import measure_model
from ecoformer.benchmark.report import Report, Row
from ecoformer.checkpoint.files import open_atomic
from ecoformer.engine.distributed import choose_device
from ecoformer.errors import EXIT_DONE, EXIT_FAILED, InputError, print_error
from ecoformer.measure import PeakMemory, copy_bandwidth, describe_environment

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A token of the first stage for every 4 x 4 pixels.
_PATCH = 4
_WITH_CORES = ("readme", "attention", "gpu")
_SUMMARY = """\
readme     attention cores, fit and evaluation at the sizes of the README (the default)
attention  every core at the first resolution, forward and with backward; then cores over all
           resolutions, B * N near 131,072, evaluation
fit        one layer's hash fit
model      evaluation of a backbone with every kind of attention, at each resolution
train      training steps of the same
gpu        all of it at the sizes that fill a GPU, models compiled; what matters most first
"""
_CLOSING = """
Each comparison is printed, and --json written, as soon as it is measured. The shipped core is held
against the reference before it is timed; `pytest -m gpu` tests it further.
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
        prog="python -m ecoformer.benchmark",
        description="Time and memory of EcoFormer beside its peers, measured in turns.",
        epilog=_SUMMARY + _CLOSING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = [line.split()[0] for line in _SUMMARY.splitlines() if not line.startswith(" ")]
    parser.add_argument("task", nargs="?", choices=tasks, default=tasks[0])
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
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves over N")
    return parser.parse_args(words)


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    device = choose_device(options.device)
    if device.type == "cuda":
        # Streams and events are of the current device.
        torch.cuda.set_device(device)
    for name in ("rounds", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1.")
    if any(side < 32 for side in options.resolutions or ()):
        raise InputError("--resolutions start at 32 pixels: the model's last stage has 1/32 of it.")
    dtype = options.dtype or ("bfloat16" if options.task == "gpu" else "float32")
    command = shlex.join(["python", "-m", "ecoformer.benchmark", *words])
    environment = describe_environment(command, device) | {"dtype": dtype}
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
            with open_atomic(options.json) as file:
                file.write(report.to_json().encode())

    tell(report.describe_environment())
    with PeakMemory(device) as memory:
        setup = Setup(device, _DTYPES[dtype], options.rounds, memory)
        checks = list(_check(setup, options))
        tell(findings=checks)
        for rows in _measure(setup, options):
            report.rows.extend(rows)
            goals = judge_comparison(report, rows, device.type)
            tell(report.describe_comparison(rows), goals)
    tell(report.describe_slopes(), judge_slopes(report))
    if options.plot:
        report.draw(options.plot)
    return EXIT_DONE if all(check.endswith(PASSED) for check in checks) else EXIT_FAILED


def _check(setup: Setup, options: argparse.Namespace) -> Iterator[str]:
    """A line a check; the last size is one that fills no tile."""
    if options.task not in _WITH_CORES:
        return
    num_tokens = _count_tokens(options.resolutions or (224,))[0]
    for count in (num_tokens, num_tokens - 1):
        try:
            yield str(check_core(setup.device, setup.dtype, num_tokens=count))
        # The other contenders can be measured all the same.
        except Exception as error:
            yield f"check: core of N={count} FAILED, {type(error).__name__}: {error}"


def _count_tokens(sides: Sequence[int]) -> list[int]:
    return [(side // _PATCH) ** 2 for side in sides]


def _measure(setup: Setup, options: argparse.Namespace) -> Iterator[list[Row]]:
    """Comparisons, in the order in which they matter: a machine may be lent for minutes only."""
    task, sides, batch_size = options.task, options.resolutions, options.batch_size
    is_gpu = task == "gpu"
    if task in _WITH_CORES:
        num_tokens, *others = _count_tokens(sides or (224, 112, 448, 512, 1024))
        yield from measure_attention(
            setup, batch_size=batch_size or (128 if is_gpu else 8), num_tokens=num_tokens
        )
        if others:
            yield from measure_attention_sweep(setup, token_counts=sorted([num_tokens, *others]))
    if task in ("readme", "fit", "gpu"):
        for num_tokens in _count_tokens(sides or (224, 512)):
            yield measure_fit(
                setup, batch_size=batch_size or (32 if is_gpu else 2), num_tokens=num_tokens
            )
    for is_training, tasks, default_sides in (
        (False, ("readme", "model", "gpu"), (224, 512, 448) if is_gpu else (224, 448)),
        (True, ("train", "gpu"), (224,)),
    ):
        for side in (sides or default_sides) if task in tasks else ():
            yield measure_model(
                setup,
                options.model,
                batch_size=batch_size or (128 if is_gpu else 8),
                resolution=side,
                is_training=is_training,
                is_compiled=is_gpu if options.compile is None else options.compile,
            )


if __name__ == "__main__":
    raise SystemExit(main())
