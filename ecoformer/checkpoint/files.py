"""Reading weight files that nobody vouches for; writing ours so that none is ever half there."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ecoformer.checkpoint.pickles import ARGUMENTS, MAX_PICKLE_BYTES, PickleScan
from ecoformer.errors import InputError
from ecoformer.files import open_atomic, open_regular, remove_stale


class _ConfigDict:
    """Stands for configuration dictionaries of packages that are not installed."""

    def __new__(cls, *items: object) -> Any:
        # The safe unpickler fills this very class with what follows, and no subclass of it.
        return OrderedDict()


_ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    *((_ConfigDict, name) for name in ARGUMENTS if not name.startswith("argparse")),
]

# How files begin that come in place of weights, and what to do about them.
_IMPOSTORS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file: run `git lfs pull`"),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page, not weights: download the file itself"),
)
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
_ZIP_START = b"PK\x03\x04"
# Among an archive's members, and in the metadata of safetensors.
_DIGEST = "ecoformer_sha256"
_UNVOUCHED = "Nothing vouches for the file's bits"
# Some 100,000 tensors; the list of an archive's members is read at once.
_MAX_INDEX_BYTES = 8 * 2**20
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}


class Checkpoint(dict[str, Any]):
    """What a weight file held; ``notes`` tell what speaks against trusting it, a sentence each."""

    notes: tuple[str, ...] = ()


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a weight file without running anything that it holds.

    PyTorch's zip and legacy files and safetensors are told apart by content, not by name. No more
    memory is taken than a few times the file's size. Damaged bits are found by an archive's own
    checksums and by the digest in files of ours; ``notes`` tells where there is neither.

    Returns:
        ``model``: name -> tensor on the CPU, as laid out in the file but without the prefixes of
        DistributedDataParallel and torch.compile; beside it the rest of a training dictionary.

    Raises:
        InputError: the file is missing, unreadable or damaged, asks for code to be run, unpacks
            to more than it may, or holds no state dict.
    """
    try:
        with open_regular(path) as file:
            content, notes = parse_checkpoint(file, str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, not a weight file; name a file in it.") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it; ask its owner or chmod it.") from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be read ({reason}); check the disk.") from error
    checkpoint = Checkpoint(unwrap_state(content, str(path)))
    checkpoint.notes = notes
    return checkpoint


def parse_checkpoint(file: IO[bytes], origin: str) -> tuple[object, tuple[str, ...]]:
    """Deserialise an open file by what its first bytes say it is, running nothing in it.

    ``origin`` is what messages call it, e.g. the file's path.

    Returns:
        Tensors, on the CPU, in containers of plain values; and notes on the file.

    Raises:
        InputError: it is no weight file, damaged, asks for code to be run, or unpacks to more
            than it may.
    """
    start = file.read(512)
    file.seek(0)
    if not start:
        raise InputError(f"{origin}: empty, 0 bytes; download or save it again.")
    for pattern, advice in _IMPOSTORS:
        # Text has no zeros, which the length of a header always has.
        if re.match(pattern, start) and 0 not in start[:8]:
            raise InputError(f"{origin}: {advice}.")
    # The length of a JSON header, then the header. Before pickle: a length may begin with 0x80.
    is_safetensors = start[8:9] == b"{"
    is_torch = start.startswith((_ZIP_START, b"\x80"))
    try:
        if is_safetensors:
            return _load_safetensors(file)
        if start.startswith(_ZIP_START):
            notes = _check_archive(file)
        else:
            _check_legacy(file)
            notes = (f"{_UNVOUCHED}: the legacy format has no checksums",)
        return _load_pickle(file), notes
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error
    # Bytes from anywhere: the libraries raise a dozen types, from KeyError to OSError.
    except Exception as error:
        if not is_safetensors and not is_torch:
            raise InputError(
                f"{origin}: neither a PyTorch file nor safetensors, begins with {start[:8]!r}; "
                "name a weight file."
            ) from error
        # PyTorch's long texts advise to load the file unsafely; the first sentence is the reason.
        reason = re.split(r"\. |\n", str(error), maxsplit=1)[0] or type(error).__name__
        kind = "safetensors" if is_safetensors else "PyTorch"
        raise InputError(
            f"{origin}: damaged, cut short or no {kind} weight file ({reason}); "
            "download or save it again."
        ) from error


class _BoundedReader(io.RawIOBase):
    """A file of which no piece is read that is larger than an archive's index may be."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_INDEX_BYTES:
            raise ValueError(f"an index of {size} bytes")
        return self._file.read(size)


def _check_archive(file: IO[bytes]) -> tuple[str, ...]:
    """Refuse a zip archive that is damaged or unpacks to more than its size; return notes."""
    num_bytes = file.seek(0, os.SEEK_END)
    try:
        archive = zipfile.ZipFile(_BoundedReader(file))
    except zipfile.BadZipFile:
        raise ValueError("no central directory at its end") from None
    with archive:
        members = archive.infolist()
        root = members[0].filename.partition("/")[0]
        _check_members(members, num_bytes)
        # torch.serialization.set_crc32_options(False) has zeros written.
        has_checksums = any(member.CRC for member in members)
        if not has_checksums:
            for member in members:
                del member.CRC
        _check_contents(archive, root)
        if has_checksums:
            return _check_bits(archive, root)
        return (f"{_UNVOUCHED}: the archive was written without checksums",)


def _check_members(members: list[zipfile.ZipInfo], num_bytes: int) -> None:
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two members of one name")
    for member in members:
        # PyTorch writes nothing else, but its reader would unpack.
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"member {member.filename} is compressed")
    if sum(member.file_size for member in members) > num_bytes:
        raise ValueError("members that are larger than the file")


def _check_contents(archive: zipfile.ZipFile, root: str) -> None:
    pickled = archive.getinfo(f"{root}/data.pkl")
    if pickled.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"a data.pkl of {pickled.file_size} bytes")
    scan = PickleScan()
    scan.run(io.BytesIO(archive.read(pickled)))
    scan.check_sharing()
    for key, storage in scan.storages.items():
        # PyTorch's reader would go on behind a member that is too short.
        if archive.getinfo(f"{root}/data/{key}").file_size != storage.num_bytes:
            raise ValueError(f"storage {key} of another size than its tensors")


def _check_bits(archive: zipfile.ZipFile, root: str) -> tuple[str, ...]:
    # PyTorch's reader does not look at checksums.
    damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of its member {damaged} is wrong")
    if f"{root}/{_DIGEST}" in archive.namelist():
        if archive.read(f"{root}/{_DIGEST}").decode() != _digest_members(archive):
            raise ValueError("its members are not those that were written")
    elif not _has_own_identifier(archive, root):
        return ("The archive was changed after PyTorch had written it: its identifier differs",)
    return ()


def _digest_members(archive: zipfile.ZipFile) -> str:
    """Hash the names, sizes and checksums of all members but the digest."""
    digest = hashlib.sha256()
    for member in sorted(archive.infolist(), key=lambda member: member.filename):
        if not member.filename.endswith(f"/{_DIGEST}"):
            digest.update(f"{member.filename} {member.file_size} {member.CRC}\n".encode())
    return digest.hexdigest()


def _has_own_identifier(archive: zipfile.ZipFile, root: str) -> bool:
    """Whether the members are those that PyTorch wrote, in this order; True where it cannot say.

    Source: ``PyTorchStreamWriter`` of PyTorch 2, which chains the checksums by ``hash_combine``.
    """
    *members, last = archive.infolist()
    if last.filename != f"{root}/.data/serialization_id" or last.file_size != 40:
        return True
    chained = 0
    for member in members:
        mixed = member.CRC + 0x9E3779B9 + (chained << 6) + (chained >> 2)
        chained = (chained ^ mixed) % 2**64
    return archive.read(last)[20:] == b"%020d" % chained


def _check_legacy(file: IO[bytes]) -> None:
    """Refuse a row of pickles, and what comes after it, that unpacks to more than its size."""
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    pickles = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    scan = PickleScan()
    # A magic number, the format's version, sizes of integers, the object, the storages' order.
    for _ in range(4):
        scan.run(pickles)
    keys = scan.run(pickles)
    scan.check_sharing()
    # Before each storage stands its length.
    expected = pickles.tell() + sum(8 + scan.storages[key].num_bytes for key in keys)
    if expected > num_bytes or set(keys) != set(scan.storages):
        raise ValueError("storages that are larger than the file")


def _load_pickle(file: IO[bytes]) -> object:
    file.seek(0)
    with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED_GLOBALS):
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


def _load_safetensors(file: IO[bytes]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    import safetensors.torch

    length = int.from_bytes(file.read(8), "little")
    if length > MAX_PICKLE_BYTES:
        raise ValueError(f"a header of {length} bytes")
    metadata = json.loads(file.read(length)).get("__metadata__", {})
    file.seek(0)
    tensors = safetensors.torch.load(file.read())
    if _DIGEST not in metadata:
        return tensors, (
            f"{_UNVOUCHED}: safetensors have no checksums, but for those that we write",
        )
    if metadata[_DIGEST] != _digest_tensors(tensors):
        raise ValueError("its tensors are not those that were written")
    return tensors, ()


def _digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash the names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()


def unwrap_state(content: object, origin: str) -> dict[str, Any]:
    """Find the state dict in what a file held, bare or in ``model`` or ``state_dict``.

    Returns:
        ``model``: name -> tensor without wrapper prefixes, and the rest of a training dictionary.

    Raises:
        InputError: there is no state dict, or it holds more than dense tensors with values.
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
        if tensor.is_meta or tensor.is_nested:
            raise InputError(f"{origin}: entry {name!r} is a meta or nested tensor; save it dense.")
        if tensor.dtype not in _DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{origin}: entry {name!r} is of type {kind}; save it as float32.")
        short = _WRAPPERS.sub("", name)
        if short in tensors:
            raise InputError(f"{origin}: has {short!r} twice, bare and wrapped; keep one of them.")
        tensors[short] = tensor
    return {**rest, "model": tensors}


def save_atomic(obj: object, path: str | os.PathLike[str]) -> None:
    """Write an object with ``torch.save``, so that its file is whole whenever one looks.

    The archive gets one more member, a digest of the others, which ``read_checkpoint`` verifies
    and PyTorch does not see.

    Raises:
        InputError: the disk refuses; what stood under ``path`` before is untouched.
    """
    path = Path(path)
    # One run writes to a folder at a time.
    remove_stale(path)
    with open_atomic(path) as file:
        torch.save(obj, file)
        with zipfile.ZipFile(file, "a") as archive:
            root = archive.infolist()[0].filename.partition("/")[0]
            archive.writestr(zipfile.ZipInfo(f"{root}/{_DIGEST}"), _digest_members(archive))


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, whole or not at all, with a digest among its metadata.

    Raises:
        InputError: the disk refuses; what stood under ``path`` before is untouched.
    """
    import safetensors.torch

    # The format has no views and no shared memory.
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with open_atomic(Path(path)) as file:
        digest = {_DIGEST: _digest_tensors(copies)}
        file.write(safetensors.torch.save(copies, {**metadata, **digest}))
