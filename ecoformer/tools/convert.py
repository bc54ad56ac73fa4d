"""Write weight files in other formats and layouts: ``ecoformer convert IN OUT``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ecoformer.config.arguments import ArgumentParser
from ecoformer.errors import EXIT_DONE, InputError, print_error

_SUFFIXES = (".safetensors", ".pth", ".pt")


def convert(source: str, path: Path, *, is_released: bool = False) -> tuple[str, ...]:
    """Write the weights of a file, and nothing else of it, in another format or layout.

    Args:
        source: a path, URL or zoo name, in any form that ``read_checkpoint`` takes.
        path: ``.safetensors``, or ``.pth`` or ``.pt`` for PyTorch.
        is_released: write the released layout and not ours. A file of PyTorch then is a training
            file ``{model, epoch}``: the released code trusts hash functions in no other.

    Returns:
        Notes on the source, a sentence each.

    Raises:
        InputError: the source cannot be read or holds NaN or infinity, its hash functions are not
            fitted (where the released layout is asked for), the path has another ending, or the
            disk refuses.
    """
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path}: name the output {path.stem or 'NAME'}{' or '.join(_SUFFIXES)}.")
    # What a run goes on from would be gone.
    if path.exists() and os.path.exists(source) and path.samefile(source):
        raise InputError(f"{path}: is what is read, and would be lost; give the output a new name.")
    # Bring torch along, for which --help need not wait.
    from ecoformer import __version__
    from ecoformer.checkpoint.files import read_checkpoint, save_atomic, save_safetensors
    from ecoformer.checkpoint.layout import to_ours, to_released
    from ecoformer.checkpoint.load import require_finite
    from ecoformer.checkpoint.zoo import resolve_source

    checkpoint = read_checkpoint(resolve_source(source))
    state = to_ours(checkpoint["model"])
    for name, tensor in state.items():
        require_finite(tensor, f"{source}: {name}")
    if is_released:
        state = to_released(state)
    if path.suffix == ".safetensors":
        layout = "released" if is_released else "ecoformer"
        metadata = {"format": "pt", "layout": layout, "ecoformer": __version__}
        save_safetensors(state, path, {**metadata, "source": Path(source).name})
    elif is_released:
        epoch = checkpoint.get("epoch")
        save_atomic({"model": state, "epoch": epoch if isinstance(epoch, int) else 0}, path)
    else:
        save_atomic(state, path)
    return checkpoint.notes


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
        "--released",
        action="store_true",
        help="for the released code, whose main.py takes NAME.pth by --resume NAME.pth --eval",
    )
    arguments = parser.parse_args(argv)
    try:
        notes = convert(arguments.input, arguments.output, is_released=arguments.released)
    except InputError as error:
        print_error(error)
        return error.exit_code
    for note in notes:
        print(f"{arguments.input}: {note}.")
    print(f"wrote {arguments.output}")
    return EXIT_DONE
