"""The command ``python -m ecoformer.benchmark``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ecoformer.benchmark.compare import Setup
from ecoformer.benchmark.cores import measure_attention, measure_attention_sweep
from ecoformer.benchmark.fits import measure_fit
from ecoformer.benchmark.models import measure_model
from ecoformer.benchmark.report import Report, Row
from ecoformer.errors import EXIT_DONE, InputError
from ecoformer.measure import PeakMemory, copy_bandwidth, describe_environment

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A token of the first stage for every 4 x 4 pixels.
_PATCH = 4
_SUMMARY = """\
readme     attention cores, fit and evaluation at the sizes of the README (the default)
attention  every core at the first resolution, forward and with backward; then cores over all
           resolutions, B * N near 131,072, evaluation
fit        one layer's hash fit
model      evaluation of a backbone with every kind of attention, at each resolution
train      training steps of the same
gpu        all of it at the sizes that fill a GPU, models compiled
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for.

    Args:
        argv: the words after the program's name; ``sys.argv`` if not given.

    Returns:
        Exit code.
    """
    words = sys.argv[1:] if argv is None else argv
    options = _parse(words)
    try:
        report = _run(options, words)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report.to_text())
    if options.json:
        options.json.write_text(report.to_json())
    if options.plot:
        report.draw(options.plot)
    return EXIT_DONE


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ecoformer.benchmark",
        description="Time and memory of EcoFormer beside its peers, measured in turns.",
        epilog=_SUMMARY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = [line.split()[0] for line in _SUMMARY.splitlines() if not line.startswith(" ")]
    parser.add_argument("task", nargs="?", choices=tasks, default=tasks[0])
    parser.add_argument("--device", help="cuda or cpu; cuda where there is one")
    parser.add_argument("--dtype", choices=_DTYPES, help="float32; bfloat16 for gpu")
    parser.add_argument("--batch-size", type=int, help="8; 2 for fit; 128 and 32 for gpu")
    parser.add_argument("--resolutions", type=int, nargs="+", help="image sides in pixels")
    parser.add_argument("--model", default="pvt_v2_b0", help="variant of PVTv2")
    parser.add_argument("--compile", action="store_true", help="models by torch.compile")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves over N")
    return parser.parse_args(words)


def _run(options: argparse.Namespace, words: Sequence[str]) -> Report:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; give --device cpu.")
    for name in ("rounds", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1.")
    if any(side < 32 for side in options.resolutions or ()):
        raise InputError("--resolutions start at 32 pixels: the model's last stage has 1/32 of it.")
    dtype = options.dtype or ("bfloat16" if options.task == "gpu" else "float32")
    command = shlex.join(["python", "-m", "ecoformer.benchmark", *words])
    environment = describe_environment(command, device) | {"dtype": dtype}
    with PeakMemory(device) as memory:
        setup = Setup(device, _DTYPES[dtype], options.rounds, memory)
        return Report(environment, copy_bandwidth(device), list(_measure(setup, options)))


def _measure(setup: Setup, options: argparse.Namespace) -> Iterator[Row]:
    task, sides, batch_size = options.task, options.resolutions, options.batch_size
    is_gpu = task == "gpu"
    token_counts = [(side // _PATCH) ** 2 for side in sides or (224, 112, 448, 512, 1024)]
    if task in ("readme", "attention", "gpu"):
        yield from measure_attention(
            setup, batch_size=batch_size or (128 if is_gpu else 8), num_tokens=token_counts[0]
        )
    if task in ("attention", "gpu") and len(token_counts) > 1:
        yield from measure_attention_sweep(setup, token_counts=sorted(token_counts))
    if task in ("readme", "fit", "gpu"):
        for side in sides or (224, 512):
            yield from measure_fit(
                setup,
                batch_size=batch_size or (32 if is_gpu else 2),
                num_tokens=(side // _PATCH) ** 2,
            )
    for model_task in ("model", "train"):
        if task in (model_task, "gpu") or (task, model_task) == ("readme", "model"):
            for side in sides or ((224,) if task == "readme" else (224, 448, 512)):
                yield from measure_model(
                    setup,
                    options.model,
                    batch_size=batch_size or (128 if is_gpu else 8),
                    resolution=side,
                    is_training=model_task == "train",
                    is_compiled=options.compile or is_gpu,
                )


if __name__ == "__main__":
    raise SystemExit(main())
