"""The command ``ecoformer benchmark``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ecoformer.config.arguments import ArgumentParser
from ecoformer.errors import EXIT_DONE, EXIT_FAILED, InputError, print_error
from ecoformer.files import write_text

if TYPE_CHECKING:
    from ecoformer.tools.table import Table

_PROG = "ecoformer benchmark"
_DTYPES = ("float32", "bfloat16", "float16")
# What each task measures, in the order in which it matters: a machine may be lent for minutes only.
_PARTS = {
    "readme": ("attention", "fit", "model"),
    "attention": ("attention",),
    "convolution": ("convolution",),
    "fit": ("fit",),
    "model": ("model",),
    "train": ("train",),
    "dense": ("dense",),
    "gpu": ("attention", "convolution", "fit", "model", "train"),
    "sequences": ("sequences",),
    "threads": (),
    "deploy": (),
    "data": (),
}
# Image sides at which it does, in pixels; of sequences numbers of tokens.
_SIDES = {
    "attention": (224, 112, 448, 512, 1024),
    "convolution": (224,),
    "fit": (224, 512),
    "model": (224, 448),
    "train": (224,),
    "sequences": (1024, 2048, 4096, 8192, 16384),
    "dense": (800,),
}
# Flags that mean nothing to a task: of what is measured on any device, and of images in files.
_OF_DEVICES = ("compile", "device", "dtype", "plot")
_OF_FILES = ("data_path", "images")
_WITHOUT_MEANING = {
    "threads": _OF_DEVICES + _OF_FILES,
    "deploy": _OF_DEVICES + _OF_FILES,
    "data": (*_OF_DEVICES, "model"),
}
_GPU_SIDES = _SIDES | {"model": (224, 512, 448)}
_EPILOG = """\
readme     attention cores, fit and evaluation at the sizes of the README (the default)
attention  every core at the first resolution, forward and with backward; then cores over all
           resolutions, B * N near 131,072, evaluation
convolution
           depthwise convolution and GELU of a block, forward and with backward
fit        one layer's hash fit
model      evaluation of a backbone with every kind of attention, at each resolution
train      training steps of the same
sequences  training steps of the sequence encoder at each number of --tokens
dense      for detection at 800 x 1,333 pixels: a backbone's maps, a training step, the fit of all
           layers on one image; --resolutions are short sides
gpu        attention to train at sizes that fill a GPU, models compiled; what matters most first;
           by --time-budget in calls of some minutes
threads    evaluation, training step and fit on one thread and on all, alone and beside a busy
           process on every core
deploy     evaluation in eager mode, compiled, by AOTInductor and by ONNX Runtime, beside timm's
data       training images from files to batches, whole and in parts, beside timm's loaders

Each comparison is printed, and --json written, as soon as it is measured. Where attention cores are
timed, the shipped one is held against the reference first; `pytest -m gpu` tests it further.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print, and write what was asked for.

    Returns:
        The process's exit code: 0 done, 1 if the shipped core computes what it should not, 2 bad
        input.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    options = _parse(words)
    try:
        is_right = _run(options, f"{_PROG} {shlex.join(words)}".rstrip())
    except InputError as error:
        print_error(error)
        return error.exit_code
    return EXIT_DONE if is_right else EXIT_FAILED


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=_PROG,
        description="Time and memory of EcoFormer beside its peers, measured in turns.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", nargs="?", choices=_PARTS, default="readme")
    parser.add_argument("--device", help="cuda or cpu; cuda where there is one")
    parser.add_argument("--dtype", choices=_DTYPES, help="float32; bfloat16 for gpu")
    parser.add_argument(
        "--batch-size",
        type=int,
        help="8; 2 for fit and sequences; 1 for dense; 128 and 32 for gpu",
    )
    parser.add_argument("--resolutions", type=int, nargs="+", help="image sides in pixels")
    parser.add_argument("--tokens", type=int, nargs="+", help="of sequences; 1,024 to 16,384")
    parser.add_argument(
        "--model", default="pvt_v2_b0", help="variant of PVTv2; of Twins too for dense"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="models by torch.compile"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (7)")
    parser.add_argument(
        "--data-path", type=Path, help="for data: a folder with train/; without it, JPEGs are made"
    )
    parser.add_argument("--images", type=int, default=512, help="for data: images a turn (512)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument(
        "--time-budget",
        type=float,
        metavar="MINUTES",
        help="begin no further part after so many; the same command goes on from --json",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves over N")
    return parser.parse_args(words)


def _run(options: argparse.Namespace, command: str) -> bool:
    for name in ("rounds", "batch_size", "images"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1.")
    usual = vars(_parse([]))
    for name in _WITHOUT_MEANING.get(options.task, _OF_FILES):
        if getattr(options, name) not in (usual[name], "cpu"):
            raise InputError(
                f"--{name.replace('_', '-')} means nothing to {options.task}; leave it out."
            )
    if options.task in ("threads", "data") and len(options.resolutions or ()) > 1:
        raise InputError(f"{options.task} takes one of --resolutions.")
    if options.time_budget is not None and not (options.json and _PARTS[options.task]):
        raise InputError(
            f"--time-budget is for {', '.join(name for name, parts in _PARTS.items() if parts)}, "
            "and needs --json FILE, from which the next call goes on."
        )
    if any(side < 32 for side in options.resolutions or ()):
        raise InputError("--resolutions start at 32 pixels: the model's last stage has 1/32 of it.")
    if any(number < 32 for number in options.tokens or ()):
        raise InputError("--tokens start at 32.")
    if options.tokens and options.task != "sequences":
        raise InputError("--tokens are of sequences; for images give --resolutions.")
    if options.task == "threads":
        return _run_threads(options, command)
    if options.task == "deploy":
        return _run_deploy(options, command)
    if options.task == "data":
        return _run_data(options, command)
    # Brings torch along, which --help need not wait for.
    from ecoformer.tools.benchmark.suite import Suite, run_suite

    is_gpu = options.task == "gpu"
    given = options.tokens if options.task == "sequences" else options.resolutions
    usual_batch_size = {"gpu": 128, "dense": 1, "sequences": 2}.get(options.task, 8)
    sides = _GPU_SIDES if is_gpu else _SIDES
    suite = Suite(
        parts={part: given or sides[part] for part in _PARTS[options.task]},
        variant=options.model,
        batch_size=options.batch_size or usual_batch_size,
        fit_batch_size=options.batch_size or (32 if is_gpu else 2),
        is_compiled=is_gpu if options.compile is None else options.compile,
        device=options.device,
        dtype=options.dtype or ("bfloat16" if is_gpu else "float32"),
        num_rounds=options.rounds,
    )
    if options.plot:
        suite.check_plot(options.plot)
    return run_suite(
        suite, command, json=options.json, plot=options.plot, time_budget=options.time_budget
    )


def _run_threads(options: argparse.Namespace, command: str) -> bool:
    import torch

    from ecoformer.tools.benchmark.backbones import Workload
    from ecoformer.tools.benchmark.threads import measure_threads
    from ecoformer.tools.measure import describe_environment

    (side,) = options.resolutions or [224]
    table = measure_threads(
        Workload(options.model, options.batch_size or 8, side, False, False),
        num_rounds=options.rounds,
        environment=describe_environment(command, torch.device("cpu")),
    )
    return _tell(table, options)


def _run_deploy(options: argparse.Namespace, command: str) -> bool:
    import torch

    from ecoformer.tools.benchmark.deploy import measure_deployment
    from ecoformer.tools.measure import describe_environment, settle_allocator

    settle_allocator()
    table = measure_deployment(
        options.model,
        options.batch_size or 8,
        options.resolutions or _SIDES["model"],
        num_rounds=options.rounds,
        environment=describe_environment(command, torch.device("cpu")),
    )
    return _tell(table, options)


def _run_data(options: argparse.Namespace, command: str) -> bool:
    import torch

    from ecoformer.tools.benchmark.data import measure_loaders
    from ecoformer.tools.measure import describe_environment

    batch_size = options.batch_size or 64
    if options.images < batch_size:
        raise InputError(f"--images {options.images} make no batch of {batch_size}; give more.")
    folder = options.data_path and options.data_path / "train"
    if folder and not folder.is_dir():
        raise InputError(f"--data-path {options.data_path} has no folder train/; name another.")
    table = measure_loaders(
        folder,
        num_images=options.images,
        batch_size=batch_size,
        side=(options.resolutions or [224])[0],
        num_rounds=options.rounds,
        environment=describe_environment(command, torch.device("cpu")),
    )
    return _tell(table, options)


def _tell(table: Table, options: argparse.Namespace) -> bool:
    print(table.to_markdown())
    if options.json:
        write_text(options.json, table.to_json() + "\n")
    return True
