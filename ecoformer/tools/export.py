"""Write a model as a file that runs without this package: ``ecoformer export``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ecoformer.config import Config, parse_config
from ecoformer.config.arguments import ArgumentParser
from ecoformer.errors import EXIT_DONE, InputError, print_error

if TYPE_CHECKING:
    from torch import Tensor, nn

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
        example = _read(options.input) if options.input else _draw(config)
        report = export(_load(config), example, options.output, dynamic=not options.fixed)
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
        "random ones of --input-size where not given",
    )
    parser.add_argument("--fixed", action="store_true", help="for the size of the input alone")
    options, model_flags = parser.parse_known_args(argv)
    return options, parse_config(model_flags)


def _load(config: Config) -> nn.Module:
    from ecoformer.checkpoint import load_checkpoint
    from ecoformer.checkpoint.files import read_checkpoint
    from ecoformer.checkpoint.layout import to_ours
    from ecoformer.checkpoint.load import name_head
    from ecoformer.checkpoint.zoo import resolve_source
    from ecoformer.models.registry import find_family

    settings = config.model
    if not config.run.resume or config.run.resume == "auto":
        raise InputError("export needs weights; give --resume FILE, URL or zoo name.")
    path = resolve_source(config.run.resume)
    family = find_family(settings.model)
    keywords = {"input_size": settings.input_size, "hashing": config.hashing, **settings.keywords}
    words = settings.model, settings.attn_type
    name, *_ = name_head(family.create_empty(*words, **keywords))
    checkpoint = read_checkpoint(path)
    head = to_ours(checkpoint["model"]).get(name, ())
    model = family.create_model(*words, num_classes=len(head), **keywords)
    load_checkpoint(model, checkpoint, strict=True, origin=str(path))
    return model


def _draw(config: Config) -> Tensor:
    import torch

    side = config.model.input_size
    size = (_BATCH_SIZE, 3, side, side)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


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
