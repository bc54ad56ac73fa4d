"""Reading weight files that nobody vouches for; writing ours so that none is ever half there."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ecoformer.errors import InputError
from ecoformer.files import open_atomic, remove_stale


class _ConfigDict:
    """What the configuration dictionaries of packages that nobody needs here become."""

    def __new__(cls, *items: object) -> Any:
        # The safe unpickler fills this very class with what follows, and no subclass of it.
        return OrderedDict()


# All that released files hold beside tensors and plain Python values: the arguments of a run.
_ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_ConfigDict, "mmcv.utils.config.ConfigDict"),
    (_ConfigDict, "addict.addict.Dict"),
]
# First parts of names that a harmless file may hold; used for messages only.
_HARMLESS_ROOTS = {"torch", "collections", "_codecs", "argparse", "mmcv", "addict"}

# How files begin that come in place of weights, and what to do about them.
_IMPOSTORS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file: run `git lfs pull`"),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page, not weights: download the file itself"),
)
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a weight file without running anything that it holds.

    PyTorch's zip and legacy files and safetensors are told apart by content, not by name.

    Args:
        path: a bare state dict, or a training dictionary with one in ``model`` or ``state_dict``.

    Returns:
        ``model``: name -> tensor on the CPU, as laid out in the file but without the prefixes of
        DistributedDataParallel and torch.compile; beside it the rest of a training dictionary.

    Raises:
        InputError: the file is missing, unreadable or damaged, asks for code to be run, or holds
            no state dict.
    """
    try:
        with open(path, "rb") as file:
            content = parse_checkpoint(file, str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, not a weight file; name a file in it.") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it; ask its owner or chmod it.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); check the disk.") from error
    return unwrap_state(content, str(path))


def parse_checkpoint(file: IO[bytes], origin: str) -> object:
    """Deserialise an open file by what its first bytes say it is, running nothing in it.

    Args:
        file: open at its start.
        origin: what messages call it, e.g. the file's path.

    Returns:
        What was saved: tensors, on the CPU, in containers of plain values.

    Raises:
        InputError: it is no weight file, damaged, or asks for code to be run.
    """
    start = file.read(512)
    file.seek(0)
    if not start:
        raise InputError(f"{origin}: empty, 0 bytes; download or save it again.")
    for pattern, advice in _IMPOSTORS:
        if re.match(pattern, start):
            raise InputError(f"{origin}: {advice}.")
    # The length of a JSON header, then the header. Before pickle: a length may begin with 0x80.
    is_safetensors = start[8:9] == b"{"
    is_torch = start.startswith((b"PK\x03\x04", b"\x80"))
    error: Exception | None = None
    try:
        if is_safetensors:
            import safetensors.torch

            return safetensors.torch.load(file.read())
        if is_torch:
            with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED_GLOBALS):
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
    # Bytes from anywhere: both libraries raise a dozen types, from KeyError to OSError.
    except Exception as caught:
        error = caught
    culprit = _find_blocked_global(file, error)
    if culprit:
        raise InputError(
            f"{origin}: asks for {culprit!r} to be run, which is refused; "
            "get a plain state dict or safetensors file from a source that you trust."
        ) from error
    if error is None:
        raise InputError(
            f"{origin}: neither a PyTorch file nor safetensors, begins with {start[:8]!r}; "
            "name a weight file."
        )
    # PyTorch's long texts advise to load the file unsafely; their first sentence is the reason.
    reason = re.split(r"\. |\n", str(error), maxsplit=1)[0] or type(error).__name__
    kind = "safetensors" if is_safetensors else "PyTorch"
    raise InputError(
        f"{origin}: damaged, cut short or no {kind} weight file ({reason}); "
        "download or save it again."
    ) from error


def _find_blocked_global(file: IO[bytes], error: Exception | None) -> str | None:
    """Name what a refused pickle wanted to import, by reading it; nothing is run."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return named[1]
    # Pickles that PyTorch's safe reader gives up on before it meets the name.
    with contextlib.suppress(Exception):
        is_zip = zipfile.is_zipfile(file)
        file.seek(0)
        if is_zip:
            archive = zipfile.ZipFile(file)
            inner = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            file = archive.open(inner)
        # A legacy file is four pickles in a row, then the raw tensors.
        for _ in range(4):
            for name in list(_list_globals(file)):
                if name.split(".")[0] not in _HARMLESS_ROOTS:
                    return name
    return None


def _list_globals(file: IO[bytes]) -> Iterator[str]:
    """Yield the dotted name of each thing that the next pickle in a file would import."""
    texts: list[str] = []
    memo: dict[int, str] = {}
    value: Any
    for opcode, value, _ in pickletools.genops(file):
        match opcode.name:
            case "GLOBAL" | "INST":
                yield str(value).replace(" ", ".")
            case "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            case "MEMOIZE":
                memo[len(memo)] = texts[-1] if texts else ""
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[value] = texts[-1] if texts else ""
            case "GET" | "BINGET" | "LONG_BINGET":
                texts.append(memo.get(value, ""))
            case _ if isinstance(value, str):
                texts.append(value)


def unwrap_state(content: object, origin: str) -> dict[str, Any]:
    """Find the state dict in what a file held, and check that it is one.

    Args:
        content: a bare state dict or a training dictionary.
        origin: what messages call it, e.g. the file's path.

    Returns:
        ``model``: name -> tensor without wrapper prefixes, and the rest of a training dictionary.

    Raises:
        InputError: there is no state dict, or it holds more than dense tensors.
    """
    expected = "expected a state dict, or a training dictionary with one in 'model'"
    rest: dict[str, Any] = {}
    state = content
    if isinstance(content, Mapping):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), Mapping):
                rest = {name: value for name, value in content.items() if name != key}
                state = content[key]
                break
    if not isinstance(state, Mapping) or not state:
        found = "nothing" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise InputError(f"{origin}: holds {found}; {expected}.")
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise InputError(f"{origin}: entry {name!r} is a {kind}, not a tensor; {expected}.")
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise InputError(f"{origin}: entry {name!r} is sparse or quantized; save it dense.")
        short = _WRAPPERS.sub("", name)
        if short in tensors:
            raise InputError(f"{origin}: has {short!r} twice, bare and wrapped; keep one of them.")
        tensors[short] = tensor
    return {**rest, "model": tensors}


def save_atomic(obj: object, path: str | os.PathLike[str]) -> None:
    """Write an object with ``torch.save``, so that its file is whole whenever one looks.

    Args:
        obj: tensors, and containers and plain values around them.
        path: the file; its folder is made if need be.

    Raises:
        InputError: the disk refuses; what stood under ``path`` before is untouched.
    """
    path = Path(path)
    # One run writes to a folder at a time.
    remove_stale(path)
    with open_atomic(path) as file:
        torch.save(obj, file)
