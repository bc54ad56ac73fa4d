"""Write a model as a file that runs without this package: ``ecoformer export``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoformer.config import Config, parse_config
from ecoformer.config.arguments import ArgumentParser
from ecoformer.errors import EXIT_DONE, InputError, print_error

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ecoformer.tasks.loading import LoadedTask

_BATCH_SIZE = 2
_EPILOG = (
    "NAME.onnx is for ONNX Runtime, NAME.pt2 for torch.export.load, NAME.aoti.pt2 for AOTInductor. "
    "Flags that shape the model are those of ecoformer train; --config takes the config.yaml of a "
    "run's folder, too. The file is run against the model in a process that cannot import "
    "ecoformer, and differences are printed; one that differs by more than rounding is not kept."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The process's exit code: 0 done, 1 the file does not compute what the model does, 2 bad
        input.
    """
    try:
        options, config = parse(argv)
    except InputError as error:
        print_error(error)
        return error.exit_code
    # Brings torch along, for which a wrong flag need not wait.
    from ecoformer.deploy import MismatchError, export

    try:
        task = _find_task(config)
        example = _read(options.input) if options.input else _draw(task)
        report = export(_load(task), example, options.output, dynamic=not options.fixed)
    except (InputError, MismatchError) as error:
        print_error(error)
        return error.exit_code
    print(f"wrote {report}")
    return EXIT_DONE


def parse(argv: Sequence[str] | None) -> tuple[Namespace, Config]:
    """Read the words: flags of this command, and those that shape the model."""
    parser = ArgumentParser(
        prog="ecoformer export",
        usage="%(prog)s --output FILE --resume WEIGHTS [--config FILE] [--model NAME] ...",
        description="Write a model as a file of standard operators.",
        epilog=_EPILOG,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--input",
        type=Path,
        metavar="NPY",
        help="images to run, [B, 3, height, width], float32, prepared as for the model; "
        "where not given, random ones of --input-size, or of --short-side and --long-side",
    )
    parser.add_argument("--fixed", action="store_true", help="for the size of the input alone")
    options, model_flags = parser.parse_known_args(argv)
    return options, parse_config(model_flags)


def _find_task(config: Config) -> LoadedTask:
    from ecoformer.tasks import find_task
    from ecoformer.tasks.loading import LoadedTask

    task = find_task(config.run.task)(config)
    if not isinstance(task, LoadedTask) or task.inputs != "images":
        raise InputError(
            f"ecoformer export writes models of images, and --task {config.run.task} has others; "
            "call ecoformer.load_run(FOLDER).model in Python."
        )
    return task


def _load(task: LoadedTask) -> nn.Module:
    from ecoformer.checkpoint import load_checkpoint
    from ecoformer.checkpoint.files import read_checkpoint
    from ecoformer.checkpoint.layout import to_ours
    from ecoformer.checkpoint.load import count_classes
    from ecoformer.checkpoint.zoo import resolve_source
    from ecoformer.models.registry import find_family
    from ecoformer.tasks.dense import DensePrediction

    config, settings = task.config, task.config.model
    if not config.run.resume or config.run.resume == "auto":
        raise InputError("export needs weights; give --resume FILE, URL or zoo name.")
    path = resolve_source(config.run.resume)
    family = find_family(settings.model)
    keywords = {"input_size": settings.input_size, "hashing": config.hashing, **settings.keywords}
    words = settings.model, settings.attn_type
    empty = task.build_model(partial(family.create_empty, *words, **keywords), 1)
    checkpoint = read_checkpoint(path)
    _require_task(checkpoint, config, str(path))
    num_classes = count_classes(empty, to_ours(checkpoint["model"]))
    if not num_classes and isinstance(task, DensePrediction):
        raise InputError(
            f"{path}: holds no heads of --task {config.run.task}; give a checkpoint of that."
        )
    model = task.build_model(partial(family.create_model, *words, **keywords), num_classes)
    load_checkpoint(model, checkpoint, strict=True, origin=str(path))
    return model


def _require_task(checkpoint: Mapping[str, Any], config: Config, origin: str) -> None:
    """Refuse a run's checkpoint of another task; bare weights do not tell theirs."""
    settings = checkpoint.get("config")
    trained = settings.get("task") if isinstance(settings, Mapping) else None
    if trained not in (None, config.run.task):
        raise InputError(
            f"{origin}: is of a run of --task {trained}, not {config.run.task}; add that flag, or "
            "give --config the config.yaml of the run's folder."
        )


def _draw(task: LoadedTask) -> Tensor:
    import torch

    (images,) = task.draw_inputs(_BATCH_SIZE, torch.Generator().manual_seed(0))
    assert isinstance(images, torch.Tensor)
    return images


def _read(path: Path) -> Tensor:
    import numpy as np
    import torch

    try:
        images = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"--input {path}: cannot be read ({error.strerror}).") from None
    except (ValueError, EOFError):
        raise InputError(
            f"--input {path}: is no array of numbers; write it by numpy.save('NAME.npy', images)."
        ) from None
    return torch.from_numpy(images)
