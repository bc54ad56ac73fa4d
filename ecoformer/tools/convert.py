"""Write weight files in other formats and layouts: ``ecoformer convert IN OUT``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ecoformer.config.arguments import ArgumentParser
from ecoformer.errors import EXIT_DONE, InputError, print_error
from ecoformer.files import open_atomic

_SUFFIXES = (".safetensors", ".pth", ".pt")


def convert(source: str, path: Path, *, is_released: bool = False) -> None:
    """Write the weights of a file, and nothing else of it, in another format or layout.

    Args:
        source: a path, URL or zoo name, in any form that ``read_checkpoint`` takes.
        path: ``.safetensors``, or ``.pth`` or ``.pt`` for a bare state dict of PyTorch.
        is_released: write the released layout, which the released code loads, and not ours.

    Raises:
        InputError: the source cannot be read or holds NaN or infinity, its hash functions are not
            fitted (where the released layout is asked for), the path has another ending, or the
            disk refuses.
    """
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path}: name the output {path.stem or 'NAME'}{' or '.join(_SUFFIXES)}.")
    # Bring torch along, for which --help need not wait.
    import torch

    from ecoformer.checkpoint.files import read_checkpoint, save_atomic
    from ecoformer.checkpoint.layout import to_ours, to_released
    from ecoformer.checkpoint.load import require_finite
    from ecoformer.checkpoint.zoo import resolve_source

    state = to_ours(read_checkpoint(resolve_source(source))["model"])
    for name, tensor in state.items():
        require_finite(tensor, f"{source}: {name}")
    if is_released:
        state = to_released(state)
    if path.suffix != ".safetensors":
        save_atomic(state, path)
        return
    import safetensors.torch

    from ecoformer import __version__

    metadata = {
        "format": "pt",
        "layout": "released" if is_released else "ecoformer",
        "ecoformer": __version__,
        "source": Path(source).name,
    }
    save_safetensors(state, path, metadata)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the process's exit code, 0 done or 2 bad input."""
    parser = ArgumentParser(
        prog="ecoformer convert",
        description="Write the weights of a file, and nothing else of it, in another format or "
        "layout; what is read runs no code.",
    )
    parser.add_argument("input", metavar="IN", help="path, URL or zoo name")
    parser.add_argument(
        "output", metavar="OUT", type=Path, help="NAME.safetensors, or NAME.pth for PyTorch"
    )
    parser.add_argument(
        "--released", action="store_true", help="lay them out for the released code, not for ours"
    )
    arguments = parser.parse_args(argv)
    try:
        convert(arguments.input, arguments.output, is_released=arguments.released)
    except InputError as error:
        print_error(error)
        return error.exit_code
    print(f"wrote {arguments.output}")
    return EXIT_DONE
