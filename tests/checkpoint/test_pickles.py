"""Files that are small and unpack to more, or to what no weights are: refused before they do."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import resource
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecoformer.checkpoint import load_checkpoint, read_checkpoint
from ecoformer.checkpoint.pickles import MAX_PICKLE_BYTES
from ecoformer.errors import InputError
from tests.checkpoint.weights import Entries

WEIGHTS = {"w": torch.arange(4.0)}
LEGACY = {"_use_new_zipfile_serialization": False}
# Beyond what the test's process has when it starts.
ALLOWED_BYTES = 300 * 2**20
# As torch.save writes them, whatever is said about the object and its storages after that.
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def to_bytes(content: object, **options: Any) -> bytes:
    """What ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def in_optimizer(value: object) -> object:
    """A training dictionary with something in it that is no weight."""
    return {"model": WEIGHTS, "optimizer": {"state": {0: {"step": value}}}, "epoch": 3}


def view(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
    """A tensor over four values, of any claim."""
    storage = torch.zeros(4).storage()
    hooks: dict[str, object] = OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, hooks)


def rezip(content: bytes, changed: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """The same archive with other members, and checksums that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in dict.fromkeys([*old.namelist(), *changed]):
            new.writestr(name, changed[name] if name in changed else old.read(name))
    return buffer.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    """An archive of one tensor whose pickle says something else."""
    return rezip(to_bytes(WEIGHTS), {"archive/data.pkl": pickled})


def doubled_list(depth: int) -> list[object]:
    """Small in memory; 2 ** depth values for whom goes through it."""
    inner: list[object] = [1]
    for _ in range(depth):
        inner = [inner, inner]
    return inner


def doubled_tuple(depth: int) -> tuple[object, ...]:
    """The same, and its hash takes as long."""
    inner: tuple[object, ...] = (1,)
    for _ in range(depth):
        inner = (inner, inner)
    return inner


def keyed_by(value: str) -> bytes:
    """A pickle of a dictionary whose key is what some instructions make."""
    return b"\x80\x02}" + value.encode("latin-1") + b"K\x01s."


def overlapping() -> bytes:
    """An archive whose members are all the same million bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(10**6))
        for number in range(1, 5000):
            member = zipfile.ZipInfo(f"archive/data/{number}")
            first = archive.getinfo("archive/data/0")
            member.header_offset, member.file_size = first.header_offset, first.file_size
            member.compress_size, member.CRC = first.compress_size, first.CRC
            archive.filelist.append(member)
    return buffer.getvalue()


def crowded() -> bytes:
    """An archive of 200,000 empty members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        template = archive.getinfo("archive/data.pkl")
        for number in range(200_000):
            member = zipfile.ZipInfo(f"archive/data/{number}")
            member.header_offset, member.CRC = template.header_offset, 0
            archive.filelist.append(member)
    return buffer.getvalue()


def safetensors_of(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def safetensors_typed(dtype: str, num_bytes: int) -> bytes:
    entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, num_bytes]}
    return safetensors_of(json.dumps({"w": entry}).encode(), bytes(num_bytes))


def itself() -> list[object]:
    found: list[object] = []
    found.append(found)
    return found


BIG = b"\x80\x02]" + b"X\0\0\0\1" + bytes(2**24) + b"a."
# A storage of 2 ** 40 values, of which the file has none.
LEGACY_CLAIM = (
    LEGACY_START + b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0aX\x03\0\0\0cpu"
    b"\x8a\x06\0\0\0\0\0\1NtQ.\x80\x02]X\x01\0\0\0aa."
)

ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a pickle of zeros, compressed": (
        lambda: rezip(to_bytes(WEIGHTS), {"archive/data.pkl": bytes(2**26)}, zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "a large pickle": (lambda: with_pickle(BIG), "a data.pkl of"),
    "a large pickle, legacy": (lambda: LEGACY_START + BIG, "damaged, cut short"),
    "an endless pickle": (lambda: with_pickle(b"\x80\x02" + b"NK\x01" * 1_500_000), "instructions"),
    "members that are one": (overlapping, "members that are larger than the file"),
    "members without number": (crowded, "an index of"),
    "members of one name": (
        lambda: to_bytes(WEIGHTS).replace(b"archive/version", b"archive/data/0\0"),
        "two members|damaged",
    ),
    "a storage that is not there": (
        lambda: rezip(to_bytes({"w": torch.zeros(10**6)}), {"archive/data/0": bytes(4)}),
        "storage 0 of another size",
    ),
    "a storage that is not there, legacy": (lambda: LEGACY_CLAIM, "larger than the file"),
    "a view beyond its storage": (lambda: to_bytes({"w": view((5,), (1,))}), r"shape \[5\] over 4"),
    "a view from beyond": (lambda: to_bytes({"w": view((4,), (1,), 1)}), r"shape \[4\] over 4"),
    "a view of long strides": (lambda: to_bytes({"w": view((2, 2), (2, 2))}), "over 4 values"),
    "a view of stride 0": (lambda: to_bytes({"w": view((10**12,), (0,))}), "over 4 values"),
    "an expanded tensor": (lambda: to_bytes({"w": torch.ones(1).expand(99)}), "over 1 values"),
    "a view with a negative stride": (lambda: to_bytes({"w": view((2,), (-1,))}), "no shape"),
    "a view of many axes": (lambda: to_bytes({"w": view((1,) * 99, (1,) * 99)}), "damaged"),
    "an endless empty view": (lambda: to_bytes({"w": view((0, 2**62), (1, 1))}), "no shape"),
    "a storage shown again and again": (
        lambda: to_bytes(dict.fromkeys("abcdefghijkl", WEIGHTS["w"])),
        "tensors of",
    ),
    "views of all of a storage": (
        lambda: to_bytes({name: WEIGHTS["w"][:] for name in "abcdefghijkl"}),
        "tensors of",
    ),
    "a tensor that is given another storage": (
        lambda: with_pickle(
            pickle.dumps({"w": 1}, 2)[:-3] + b"X\1\0\0\0bctorch._utils\n_rebuild_tensor\n)b."
        ),
        "damaged",
    ),
    "lists that unfold": (lambda: to_bytes(in_optimizer(doubled_list(60))), "unfold to"),
    "arguments that unfold": (
        lambda: to_bytes({"model": WEIGHTS, "args": argparse.Namespace(x=doubled_list(60))}),
        "unfold to",
    ),
    "arguments that unfold, legacy": (
        lambda: to_bytes(
            {"model": WEIGHTS, "args": argparse.Namespace(x=doubled_list(60))}, **LEGACY
        ),
        "unfold to",
    ),
    "a key whose hash unfolds": (
        lambda: with_pickle(keyed_by("K\x01" + "\x85q\x01h\x01\x86" * 60)),
        "a tuple for a key",
    ),
    "a set whose hashes unfold": (
        lambda: to_bytes(in_optimizer(Call(set, [doubled_tuple(60)]))),
        "a tuple for a key",
    ),
    "keys that collide": (
        lambda: with_pickle(pickle.dumps({k * (2**61 - 1): 0 for k in range(30)}, 2)),
        "a int for a key",
    ),
    "a deep list": (
        lambda: with_pickle(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
        "deep",
    ),
    "a list in itself": (lambda: to_bytes(in_optimizer(itself())), "holds itself"),
    "counters of counters": (
        lambda: with_pickle(
            b"\x80\x02("
            + b"ccollections\nCounter\nq\0}q\1("
            + b"".join(b"M" + k.to_bytes(2, "little") + b"N" for k in range(60000))
            + b"u"
            + b"h\0h\1\x85R" * 10**5
            + b"t."
        ),
        "instructions",
    ),
    "bytes of bytes": (
        lambda: with_pickle(
            b"\x80\x02(c_codecs\nencode\nq\0X\x40\x42\x0f\0"
            + b"a" * 10**6
            + b"q\1X\5\0\0\0asciiq\2"
            + b"h\0h\1h\2\x86R" * 10**5
            + b"t."
        ),
        "instructions",
    ),
    "a buffer of a size": (lambda: to_bytes(in_optimizer(Call(bytearray, 2**40))), "bytearray"),
    "a tensor class": (
        lambda: to_bytes(in_optimizer(Call(torch.FloatTensor, 2**40))),
        "FloatTensor",
    ),
    "a meta tensor": (lambda: to_bytes({"w": torch.ones(3, device="meta")}), "a meta tensor"),
    "a nested tensor": (
        lambda: to_bytes({"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}),
        "a nested tensor",
    ),
    "a quantized tensor": (
        lambda: to_bytes({"w": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}),
        "quantized|unusual",
    ),
    "a float8 tensor": (
        lambda: to_bytes({"w": torch.ones(3).to(torch.float8_e4m3fn)}),
        "unusual type",
    ),
    "a float4 tensor": (
        lambda: to_bytes({"w": torch.ones(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}),
        "unusual type",
    ),
    "a complex tensor": (lambda: to_bytes({"w": torch.ones(3, dtype=torch.complex64)}), "unusual"),
    "a uint16 tensor, legacy": (
        lambda: to_bytes({"w": torch.ones(3, dtype=torch.uint16)}, **LEGACY),
        "unusual type",
    ),
    "a meta tensor in the optimizer": (
        lambda: to_bytes(in_optimizer(torch.ones(3, device="meta"))),
        "a meta tensor",
    ),
    "a sparse tensor in the optimizer": (
        lambda: to_bytes(in_optimizer(torch.eye(3).to_sparse())),
        "a sparse tensor",
    ),
    "a safetensors header without end": (
        lambda: safetensors_of(b'{"a":"' + bytes(MAX_PICKLE_BYTES)),
        "a header of",
    ),
    "a deep safetensors header": (lambda: safetensors_of(b'{"a":' + b"[" * 10**5), "safetensors"),
    "a safetensors header that is a list": (lambda: safetensors_of(b'{"a":[]}'), "safetensors"),
    "safetensors of float8": (
        lambda: safetensors_typed("F8_E4M3", 4),
        "'w' is of type float8_e4m3fn",
    ),
    "safetensors of float4": (lambda: safetensors_typed("F4", 2), "'w' is of type float4|damaged"),
}


def read_bounded(path: Path) -> tuple[str, float]:
    """What reading ends with where memory is short, and after which time."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWED_BYTES, used + ALLOWED_BYTES))
    began = time.monotonic()
    try:
        read_checkpoint(path)
        message = "read"
    except InputError as error:
        message = str(error)
    return message, time.monotonic() - began


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ATTACKS)
def test_refused_before_it_unpacks(name: str, tmp_path: Path) -> None:
    make, reason = ATTACKS[name]
    path = tmp_path / "weights.pth"
    path.write_bytes(make())
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        message, elapsed_s = pool.submit(read_bounded, path).result(60)
    assert message.startswith(f"{path}: ")
    assert re.search(reason, message), message
    assert "\n" not in message
    assert len(message) < 600
    assert elapsed_s < 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(3, device="meta"), "'w' is a meta or nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(3)]), "'w' is a meta or nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(3)], layout=torch.jagged), "'w' is "),
        (lambda: torch.ones(3).to(torch.float8_e5m2), "'w' is of type float8_e5m2"),
        (lambda: torch.ones(3, dtype=torch.complex64), "'w' is of type complex64"),
        (lambda: torch.ones(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "type float4"),
        (lambda: torch.eye(3).to_sparse(), "'w' is sparse or quantized"),
    ],
)
def test_a_state_dict_of_unusual_tensors_is_refused(
    make: Callable[[], Tensor], reason: str
) -> None:
    with pytest.raises(InputError, match=f"the state dict: entry .*{reason}"):
        load_checkpoint(Entries(WEIGHTS), {"w": make()})


def harmless() -> dict[str, object]:
    """What training files hold beside weights, made by real optimisers and schedules."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 1, 2])
    marked = torch.ones(2)
    marked.mark = "kept"  # type: ignore[attr-defined]
    base = torch.arange(12.0).view(3, 4)
    return {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "parameter": torch.nn.Parameter(base),
        "tied": [base, base, base.t(), base[1:, ::2]],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "marked": marked,
        "types": [getattr(torch, name) for name in ("float32", "bfloat16", "int8", "bool")],
        "kinds": [torch.ones(2).to(kind) for kind in (torch.half, torch.bfloat16, torch.bool)],
        "size": base.shape,
        "device": torch.device("cpu"),
        "plain": [None, True, 1.5, -7, 2**70, "ü", b"bytes", {1, 2}, (1, (2,)), {1: {"a": []}}],
        "args": argparse.Namespace(lr=1e-3, milestones=Counter({1: 2})),
    }


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_all_that_training_files_hold_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    expected = harmless()
    path.write_bytes(to_bytes(expected, **options))
    found = read_checkpoint(path)
    assert list(found) == [*(name for name in expected if name != "model"), "model"]
    assert_equal({**found}, expected)


def assert_equal(found: Any, expected: Any) -> None:
    """The same values of the same types."""
    assert type(found) is type(expected) or isinstance(expected, OrderedDict)
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_equal(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected
