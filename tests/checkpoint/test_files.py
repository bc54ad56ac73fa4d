"""Files as they arrive, damaged, malicious, wrapped or old; and saves that the disk refuses."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
import types
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ecoformer.checkpoint import load_checkpoint, read_checkpoint, save_atomic
from ecoformer.checkpoint.layout import to_ours
from ecoformer.errors import InputError
from ecoformer.tools.convert import main
from tests.checkpoint.weights import Entries, small_state
from tests.privileges import without_privileges

ROW = "pvt_v2_b0/ecoformer"
STATE: dict[str, Tensor] = {
    name: tensor for name, tensor in small_state(ROW).items() if not name.startswith("block2")
}


def to_bytes(content: object, **options: Any) -> bytes:
    """What ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def without(name: str) -> dict[str, Tensor]:
    """The good weights but for one."""
    return {other: tensor for other, tensor in STATE.items() if other != name}


def zip_of(**files: bytes) -> bytes:
    """A zip archive of some files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def safetensors_of(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file with any header, and any claim about the header's length."""
    text = json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


GOOD_ZIP = to_bytes(STATE)
GOOD_LEGACY = to_bytes(STATE, _use_new_zipfile_serialization=False)
GOOD_SAFETENSORS = safetensors.torch.save(STATE)
NOISE = bytes(range(137, 256)) * 40

# Name -> content (None: made in the test), and what the line must say.
BROKEN_FILES: dict[str, tuple[bytes | None, str]] = {
    "empty": (b"", "empty, 0 bytes"),
    "one byte": (b"\x80", "damaged, cut short"),
    "cut at 10 %": (GOOD_ZIP[: len(GOOD_ZIP) // 10], "damaged, cut short"),
    "cut at 50 %": (GOOD_ZIP[: len(GOOD_ZIP) // 2], "central directory"),
    "cut at 90 %": (GOOD_ZIP[: len(GOOD_ZIP) * 9 // 10], "central directory"),
    "cut at 99 %": (GOOD_ZIP[: len(GOOD_ZIP) * 99 // 100], "central directory"),
    "legacy, cut at 1 %": (GOOD_LEGACY[: len(GOOD_LEGACY) // 100], "damaged, cut short"),
    "legacy, cut at 50 %": (GOOD_LEGACY[: len(GOOD_LEGACY) // 2], "damaged, cut short"),
    "safetensors, cut at 50 %": (GOOD_SAFETENSORS[: len(GOOD_SAFETENSORS) // 2], "safetensors"),
    "random bytes": (NOISE, "neither a PyTorch file nor safetensors"),
    "zero bytes": (bytes(4096), "neither a PyTorch file nor safetensors"),
    "random bytes that begin like a pickle": (b"\x80" + NOISE, "damaged, cut short"),
    "zip without data": (zip_of(readme=b"hello"), "damaged, cut short"),
    "zip without tensors": (zip_of(**{"a/data.pkl": b"\x80\x02}.", "a/version": b"3"}), "nothing"),
    "empty zip": (zip_of(), "neither a PyTorch file nor safetensors"),
    "HTML page": (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "safetensors with a length that lies": (safetensors_of({}, size=2**62), "safetensors"),
    "safetensors with offsets that lie": (
        safetensors_of({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, b"1234"),
        "safetensors",
    ),
    "safetensors with a shape that lies": (
        safetensors_of({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, b"1234"),
        "safetensors",
    ),
    "a list": (to_bytes([1, 2]), "holds a list"),
    "nothing in it": (to_bytes({}), "holds nothing"),
    "an entry that is no tensor": (
        to_bytes({**STATE, "norm1.bias": [0.0]}),
        "'norm1.bias' is a list",
    ),
    "a sparse entry": (to_bytes({"w": torch.eye(3).to_sparse()}), "sparse"),
    "the same name twice": (to_bytes({"w": torch.ones(1), "module.w": torch.ones(1)}), "twice"),
    "a whole module": (to_bytes(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
    "a folder": (None, "a folder"),
    "a FIFO": (None, "a FIFO, socket or device"),
    "missing": (None, "no such file"),
    "no permission": (None, "no permission"),
    "wrong names": (to_bytes({f"net.{name}": t for name, t in STATE.items()}), "no source"),
    "a missing name": (
        to_bytes({n: t for n, t in STATE.items() if n != "norm1.bias"}),
        "norm1.bias",
    ),
    "an extra name": (to_bytes({**STATE, "norm9.bias": torch.ones(1)}), "norm9.bias"),
    "a wrong shape": (to_bytes({**STATE, "norm1.bias": torch.ones(7)}), r"norm1.bias: \[7\]"),
    "NaN": (to_bytes({**STATE, "norm1.bias": torch.tensor([torch.nan])}), "norm1.bias holds NaN"),
    "another architecture": (to_bytes(dict(small_state("alt_gvt_small/msa"))), "another model"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_file_is_one_line(name: str, tmp_path: Path) -> None:
    content, reason = BROKEN_FILES[name]
    path = tmp_path / "weights.pth"
    context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if name == "a folder":
        path.mkdir()
    elif name == "a FIFO":
        os.mkfifo(path)
    elif name == "no permission":
        path.write_bytes(GOOD_ZIP)
        path.chmod(0)
        context = without_privileges()
    elif content is not None:
        path.write_bytes(content)
    model = Entries(to_ours(STATE))
    began = time.monotonic()
    with context, pytest.raises(InputError, match=reason) as caught:
        load_checkpoint(model, path, strict=True)
    assert time.monotonic() - began < 2
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    assert "weights_only" not in line
    assert len(line) < 600
    assert all(tensor.eq(-7).all() for tensor in model.state_dict().values() if tensor.ndim)


def test_a_save_needs_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*arguments: object) -> None:
        asked.append(arguments)
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    weight = torch.zeros(3, 2**20)
    save_atomic({"w": weight}, tmp_path / "weights.pth")
    assert asked
    assert torch.equal(read_checkpoint(tmp_path / "weights.pth")["model"]["w"], weight)


def test_commands_end_with_the_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.pth").write_bytes(GOOD_ZIP[:100])
    assert main([str(tmp_path / "weights.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert re.fullmatch(r"error: .*weights\.pth: .*\n", capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pth"]


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments of a released run, with configuration dictionaries among them."""
    import addict  # type: ignore[import-untyped]

    class ConfigDict(addict.Dict):
        """Pickles as that of mmcv does, which is not installed."""

    ConfigDict.__module__, ConfigDict.__qualname__ = "mmcv.utils.config", "ConfigDict"
    for name in ("mmcv", "mmcv.utils", "mmcv.utils.config"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(ConfigDict=ConfigDict))
    nested = ConfigDict(depths=[2, 2], inner=ConfigDict(k=300))
    return argparse.Namespace(lr=5e-5, cfg=nested, plain=addict.Dict(a=addict.Dict(b=1)))


def good_files(arguments: argparse.Namespace) -> dict[str, bytes]:
    """All forms in which the same weights come."""
    training = {
        "model": STATE,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{}]},
        "lr_scheduler": {"base_values": [1e-3]},
        "epoch": 29,
        "scaler": {"scale": 65536.0},
        "args": arguments,
    }
    return {
        "zip": GOOD_ZIP,
        "legacy": GOOD_LEGACY,
        "safetensors": GOOD_SAFETENSORS,
        "ours": to_bytes(to_ours(STATE)),
        "ours in safetensors": safetensors.torch.save(to_ours(STATE)),
        "training": to_bytes(training),
        "legacy training": to_bytes(training, _use_new_zipfile_serialization=False),
        "without epoch": to_bytes({"model": STATE}),
        "timm": to_bytes({"state_dict": STATE, "epoch": 3}),
        "parameters": to_bytes({n: torch.nn.Parameter(t) for n, t in STATE.items()}),
        "distributed": to_bytes({f"module.{n}": t for n, t in STATE.items()}),
        "compiled": to_bytes({"model": {f"_orig_mod.{n}": t for n, t in STATE.items()}}),
        "both": to_bytes({f"module._orig_mod.{n}": t for n, t in STATE.items()}),
    }


@pytest.mark.parametrize("form", sorted(good_files(argparse.Namespace())))
# The name tells nothing, and may even be wrong.
@pytest.mark.parametrize("file_name", ["weights.pth", "weights.safetensors"])
def test_every_form_gives_the_same_weights(
    form: str, file_name: str, tmp_path: Path, arguments: argparse.Namespace
) -> None:
    path = tmp_path / file_name
    path.write_bytes(good_files(arguments)[form])
    model = Entries(to_ours(STATE))
    report = load_checkpoint(model, path, strict=True)
    for name, expected in to_ours(STATE).items():
        assert torch.equal(model.state_dict()[name], expected), name
    assert set(report.loaded) == set(model.state_dict())
    assert (report.derived, report.missing, report.unused) == ((), (), ())
    has_checksums = form not in ("legacy", "legacy training", "safetensors", "ours in safetensors")
    assert ("Nothing vouches for the file's bits" in str(report)) != has_checksums
    assert len(report.notes) == (not has_checksums)


@pytest.mark.parametrize("form", ["training", "legacy training"])
def test_the_rest_of_a_training_dictionary_is_there(
    form: str, tmp_path: Path, arguments: argparse.Namespace
) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(good_files(arguments)[form])
    checkpoint = read_checkpoint(path)
    assert list(checkpoint["model"]) == list(STATE)
    assert checkpoint["epoch"] == 29
    assert checkpoint["scaler"] == {"scale": 65536.0}
    assert checkpoint["args"].cfg == {"depths": [2, 2], "inner": {"k": 300}}
    assert checkpoint["args"].plain == {"a": {"b": 1}}


def test_reading_imports_no_foreign_package(
    tmp_path: Path, arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(good_files(arguments)["training"])
    for name in ("mmcv", "mmcv.utils", "mmcv.utils.config", "addict", "addict.addict"):
        # Importing it fails from now on.
        monkeypatch.setitem(sys.modules, name, None)
    assert read_checkpoint(path)["args"].lr == 5e-5


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def malicious_files(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> a file that makes the marker wherever it is unpickled freely, and what it calls."""
    touch = Call(os.system, f"touch {marker}")
    run_code = Call(eval, f"open({str(marker)!r}, 'w')")
    copy = Call(shutil.copyfile, __file__, str(marker))
    legacy = {"_use_new_zipfile_serialization": False}
    return {
        "os.system": (to_bytes({"model": touch}), "posix.system"),
        "eval": (to_bytes({"w": run_code}), "eval"),
        "exec": (to_bytes({"w": Call(exec, f"open({str(marker)!r}, 'w')")}), "exec"),
        "nested": (to_bytes({"model": {"a": [({"b": copy},)]}}), "shutil.copyfile"),
        "getattr": (to_bytes({"w": Call(getattr, touch, "x")}), "getattr"),
        "in args": (
            to_bytes({"model": STATE, "args": argparse.Namespace(lr=1, model=run_code)}),
            "eval",
        ),
        "in the optimizer": (
            to_bytes({"model": STATE, "optimizer": {"state": {0: {"step": touch}}}}),
            "posix.system",
        ),
        "legacy": (to_bytes({"model": STATE, "args": touch}, **legacy), "posix.system"),
        "legacy, eval": (to_bytes({"w": run_code}, **legacy), "eval"),
        "newer pickle in zip": (to_bytes({"w": touch}, pickle_protocol=4), "posix.system"),
        "newer pickle, legacy": (
            to_bytes([run_code], pickle_protocol=5, **legacy),
            "builtins.eval",
        ),
        "pickle 0": (pickle.dumps(touch, protocol=0), "posix.system"),
        "pickle 2": (pickle.dumps({"model": run_code}, protocol=2), "eval"),
        "pickle 5": (pickle.dumps([touch, copy], protocol=5), "posix.system"),
    }


@pytest.mark.parametrize("name", malicious_files(Path("marker")))
def test_malicious_pickle_is_refused_and_named(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content, culprit = malicious_files(marker)[name]
    # A good name does not help it.
    path = tmp_path / "pvtv2_b0_ecoformer.pth"
    path.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(InputError, match=f"asks for '{culprit}' to be run") as caught:
        read_checkpoint(path)
    assert time.monotonic() - began < 2
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pickle 0", "pickle 2", "pickle 5"])
def test_malicious_pickles_of_these_tests_are_live(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(malicious_files(marker)[name][0])
    assert marker.exists()


FAILURES = [
    (call, code)
    for call in ("write", "fsync", "rename")
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
]


def break_disk(call: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one kind of call fail from now on, a write after its first 1000 bytes."""

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    class FullFile(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 1000:
                fail()
            return super().write(data)

    if call == "write":
        monkeypatch.setattr("ecoformer.files._EagerFile", FullFile)
    else:
        monkeypatch.setattr(os, "replace" if call == "rename" else call, fail)


@pytest.mark.parametrize(("call", "code"), FAILURES)
def test_disk_failure_leaves_the_previous_checkpoint(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last_checkpoint.pth"
    save_atomic({"w": torch.ones(3)}, path)
    with monkeypatch.context() as broken:
        break_disk(call, code, broken)
        with pytest.raises(InputError) as caught:
            save_atomic({"w": torch.zeros(1000, 10)}, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be written ({os.strerror(code)}), nothing")
    assert "\n" not in message
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.ones(3))

    save_atomic({"w": torch.zeros(2)}, path)
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.zeros(2))


def save_beyond_limit(path: Path) -> None:
    """Save where no file may pass 100 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save_atomic({str(index): torch.zeros(10_000) for index in range(9)}, path)


def test_disk_that_is_really_full_is_told_as_such(tmp_path: Path) -> None:
    # In a process of its own, for all of which the limit holds.
    with (
        ProcessPoolExecutor(1, get_context("fork")) as pool,
        pytest.raises(InputError, match=r"cannot be written \(File too large\), nothing"),
    ):
        pool.submit(save_beyond_limit, tmp_path / "a.pth").result()
    assert list(tmp_path.iterdir()) == []


def test_failed_first_save_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        save_atomic({"w": lambda: None}, tmp_path / "new" / "a.pth")
    assert list((tmp_path / "new").iterdir()) == []


def test_save_clears_what_killed_saves_left(tmp_path: Path) -> None:
    for name in (".a.pth.0123abcd.tmp", ".b.pth.0123abcd.tmp"):
        (tmp_path / name).write_bytes(b"half")
    save_atomic({"w": torch.ones(1)}, tmp_path / "a.pth")
    assert {file.name for file in tmp_path.iterdir()} == {"a.pth", ".b.pth.0123abcd.tmp"}


def test_saved_file_has_the_usual_rights(tmp_path: Path) -> None:
    save_atomic({"w": torch.ones(1)}, tmp_path / "a.pth")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.pth").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_convert_and_back(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, ours = tmp_path / "released.pth", tmp_path / f"ours{suffix}"
    source.write_bytes(to_bytes({"model": STATE, "epoch": 3}))
    assert main([str(source), str(ours)]) == 0
    assert main([str(ours), str(tmp_path / "back.pth"), "--released"]) == 0
    assert "wrote" in capsys.readouterr().out

    expected = to_ours(STATE)
    state = read_checkpoint(ours)["model"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    back = read_checkpoint(tmp_path / "back.pth")["model"]
    assert back.keys() == STATE.keys()
    assert all(torch.equal(back[n], STATE[n]) for n in STATE if not n.endswith("projection_matrix"))


@pytest.mark.parametrize(("epoch", "expected"), [(3, 3), (None, 0)])
def test_convert_writes_what_the_released_code_trusts(
    epoch: int | None, expected: int, tmp_path: Path
) -> None:
    training = {"model": to_ours(STATE)} | ({} if epoch is None else {"epoch": epoch})
    (tmp_path / "ours.pth").write_bytes(to_bytes(training))
    assert main([str(tmp_path / "ours.pth"), str(tmp_path / "released.pth"), "--released"]) == 0
    # The released main.py loads "model" strictly, and keeps hash functions only beside an "epoch".
    found = torch.load(tmp_path / "released.pth", map_location="cpu", weights_only=True)
    assert list(found) == ["model", "epoch"]
    assert found["epoch"] == expected
    assert {name: t.shape for name, t in found["model"].items()} == {
        name: t.shape for name, t in STATE.items()
    }


def test_convert_keeps_a_bare_state_dict_for_safetensors(tmp_path: Path) -> None:
    (tmp_path / "ours.pth").write_bytes(to_bytes({"model": to_ours(STATE), "epoch": 3}))
    assert main([str(tmp_path / "ours.pth"), str(tmp_path / "a.safetensors"), "--released"]) == 0
    assert safetensors.torch.load_file(tmp_path / "a.safetensors").keys() == STATE.keys()


def test_convert_says_where_nothing_vouches_for_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.pth").write_bytes(GOOD_LEGACY)
    assert main([str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]) == 0
    note, wrote = capsys.readouterr().out.splitlines()
    assert note.startswith(f"{tmp_path / 'a.pth'}: Nothing vouches for the file's bits")
    assert wrote == f"wrote {tmp_path / 'b.pth'}"


@pytest.mark.parametrize("name", ["weights.txt", "weights", "weights.npz"])
def test_convert_refuses_an_ending_that_says_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.pth").write_bytes(GOOD_ZIP)
    assert main([str(tmp_path / "a.pth"), str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}: name the output weights.safetensors or .pth or .pt." in line
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_convert_refuses_unsound_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {**STATE, "norm4.bias": torch.full_like(STATE["norm4.bias"], float("nan"))}
    (tmp_path / "a.pth").write_bytes(to_bytes(bad))
    assert main([str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.pth: norm4.bias holds NaN or infinity" in line
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_safetensors_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(GOOD_ZIP)
    layouts = {"ours.safetensors": [], "theirs.safetensors": ["--released"]}
    for name, flags in layouts.items():
        assert main([str(tmp_path / "a.pth"), str(tmp_path / name), *flags]) == 0
        with safetensors.safe_open(tmp_path / name, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert metadata["layout"] == ("released" if flags else "ecoformer")
        assert metadata["source"] == "a.pth"


def test_unfitted_hash_functions_do_not_become_released_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_atomic(Entries(to_ours(STATE)).state_dict(), tmp_path / "a.pth")
    assert main([str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--released"]) == 2
    assert "fit_hash_functions" in capsys.readouterr().err
    assert not (tmp_path / "b.pth").exists()


def test_conversion_onto_itself_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "last_checkpoint.pth"
    save_atomic({"model": {"a": torch.zeros(2)}, "optimizer": {}, "epoch": 3}, path)
    before = path.read_bytes()
    (tmp_path / "link.pth").symlink_to(path)
    for output in (path, tmp_path / "link.pth"):
        assert main([str(path), str(output)]) == 2
        assert "is what is read" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_second_interrupt_ends_a_save_as_one(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save_atomic({"old": torch.zeros(1)}, path)

    class Interrupting:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_atomic({"model": torch.zeros(1000), "late": Interrupting()}, path)
    assert list(read_checkpoint(path)["model"]) == ["old"]
    assert os.listdir(tmp_path) == ["a.pth"]
