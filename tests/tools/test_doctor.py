"""The doctor finds what is wrong, says what to do, and leaves nothing behind."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from ecoformer.ops.backends.native import library
from ecoformer.tools.doctor import checks
from ecoformer.tools.doctor.checks import Finding
from ecoformer.tools.doctor.command import main
from tests.data.dense_files import write_coco, write_label_maps
from tests.data.images import BAD_IMAGES, spoil, write_images
from tests.privileges import without_privileges


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 40, 6)


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    """Data to spoil."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def examine(check: Callable[[argparse.Namespace], Iterator[Finding]], **fields: Any) -> list[str]:
    """What one check says, a line a finding."""
    options = {
        "data_path": None,
        "data_set": "IMNET",
        "quick": False,
        "output_dir": Path("runs"),
        "device": "cpu",
    }
    findings = checks.run_check(check, argparse.Namespace(**options | fields))
    lines = [f"{finding.level}: {finding.message}" for finding in findings]
    assert not any("\n" in line for line in lines)
    return lines


def examine_data(path: Path, **fields: Any) -> list[str]:
    return examine(checks.check_data, data_path=str(path), **fields)


def test_all_is_well(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "runs" / "new"
    flags = ["--data-path", str(data), "--output_dir", str(output), "--device", "cpu"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    levels = [line.split()[0] for line in out.splitlines()[:-2]]
    assert set(levels) <= {"ok", "note"}
    assert out.endswith("no problems\n")
    for part in (
        f"torch {metadata.version('torch')}",
        "train: 40 images of 2 classes; of 40 decoded none bad",
        "val: 6 images of 2 classes",
        f"{output}: ",
        "attention on cpu runs by the backend ",
        "a training step with a hash fit on cpu",
        "gloo works",
    ):
        assert part in out
    assert os.listdir(tmp_path) == []


def test_a_problem_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data-path", str(tmp_path / "gone"), "--output_dir", str(tmp_path)]
    assert main([*flags, "--device", "cpu"]) == 2
    out = capsys.readouterr().out
    # Both splits lack it; it is said once.
    assert out.count("gone is no folder") == 1
    assert out.endswith("\n1 problem\n")


def test_each_bad_image_is_named(copy: Path) -> None:
    classes = copy / "train"
    names = [classes / "ab"[n % 2] / f"{n:03}.png" for n in range(len(BAD_IMAGES))]
    for file, kind in zip(names, BAD_IMAGES, strict=True):
        spoil(file, BAD_IMAGES[kind])
    lines = examine_data(copy)
    assert f"of 40 decoded {len(names)} bad" in lines[0]
    bad = [line for line in lines if line.startswith("problem: cannot read ")]
    assert sorted(line.split()[3] for line in bad) == sorted(map(str, names))
    assert all(line.endswith("; replace or delete it.") for line in bad)
    assert lines[-1].startswith("ok: val: ")


def test_quick_decodes_a_sample(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_NUM_QUICK_IMAGES", 10)
    for number in range(40):
        spoil(copy / "train" / "ab"[number % 2] / f"{number:03}.png", b"")
    lines = examine_data(copy, quick=True)
    assert "40 images of 2 classes; of 10 decoded 10 bad" in lines[0]
    assert len({line for line in lines if "cannot read" in line}) == 10
    assert "of 6 decoded none bad" in lines[-1]


def test_progress_has_an_end_in_sight(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ecoformer.engine.logs._SECONDS_BETWEEN_LINES", 0)
    examine_data(data)
    lines = capsys.readouterr().err.splitlines()
    assert "decoding train 1/40 0 bad 0:00:" in lines[0]
    assert "decoding val 6/6 0 bad 0:00:00 left" in lines[-1]


def test_empty_classes_are_counted_and_the_other_split_is_read(copy: Path) -> None:
    for name in ("c", "d", "e"):
        (copy / "train" / name).mkdir()
    lines = examine_data(copy)
    assert lines[0].startswith(f"problem: class folder {copy / 'train' / 'c'} (and 2 more) holds")
    assert lines[1].startswith("ok: val: 6 images")


def test_splits_with_other_classes_are_a_problem(copy: Path) -> None:
    (copy / "val" / "b").rename(copy / "val" / "c")
    lines = examine_data(copy)
    assert lines[0].startswith("problem: val/ lacks 1 classes of the other split (b)")


def test_no_data_are_a_note_and_digits_need_no_path() -> None:
    assert examine(checks.check_data) == [
        "note: no data were looked at; name them by --data-path and --data-set."
    ]
    lines = examine(checks.check_data, data_set="DIGITS", quick=True)
    assert [line.split(":")[0] for line in lines] == ["ok", "ok"]
    assert "train: 1,437 images of 10 classes; of 1,000 decoded none bad" in lines[0]


def test_folders_of_detection_and_segmentation_are_read(tmp_path: Path) -> None:
    coco, ade = write_coco(tmp_path / "coco"), write_label_maps(tmp_path / "ade")
    lines = examine_data(coco, data_set="COCO")
    # To train, images without a box that counts are left out.
    assert "ok: train: 2 images of 3 classes; of 2 decoded none bad" in lines[0]
    assert "ok: val: 4 images of 3 classes; of 4 decoded none bad" in lines[1]
    bad_map = ade / "annotations" / "training" / "001.png"
    Image.new("L", (9, 9)).save(bad_map)
    (coco / "val2017" / "0009.png").unlink()
    first, bad, last = examine_data(ade, data_set="ADE20K")
    assert "note: train: 3 images of 150 classes; of 3 decoded 1 bad" in first
    image = ade / "images" / "training" / "001.png"
    assert bad == (
        f"problem: cannot read {image} (its map {bad_map} has 9 x 9 pixels, not 50 x 41); replace "
        "or delete it."
    )
    assert last.startswith("ok: val: 3 images")
    problem, _ = examine_data(coco, data_set="COCO")
    assert problem.startswith("problem: ") and "image 9, and 0 others, are not there" in problem


def test_a_sample_of_what_has_no_files_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_NUM_QUICK_IMAGES", 3)
    lines = examine(checks.check_data, data_set="PATHFINDER")
    assert "train: 160,000 images of 2 classes; of 3 decoded none bad" in lines[0]


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        (line,) = examine(checks.check_output, output_dir=folder)
        assert line.startswith(f"problem: --output_dir {folder} cannot be written (Not a directory")


def test_output_folder_that_may_not_be_looked_into(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    with without_privileges():
        [line] = examine(checks.check_output, output_dir=locked / "run")
    assert line.startswith(f"problem: --output_dir {locked / 'run'} cannot be written (Permission")
    locked.chmod(0o700)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_output_folder_that_cannot_save(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, refuse)
    (line,) = examine(checks.check_output, output_dir=tmp_path)
    assert line.startswith("problem: ") and "No space left on device" in line
    assert os.listdir(tmp_path) == []


def test_little_room_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2e9))
    lines = examine(checks.check_output, output_dir=tmp_path)
    assert "2.0 GB free" in lines[0]
    assert lines[1].startswith("note: ") and "takes 3 GB" in lines[1]


def install(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], needs: dict[str, Sequence[str]]
) -> list[str]:
    """What the check says of an environment of these versions and requirements."""

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    def requires(name: str) -> Sequence[str]:
        if name not in needs:
            raise metadata.PackageNotFoundError(name)
        return needs[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", requires)
    return examine(checks.check_environment)


NEEDS: dict[str, Sequence[str]] = {
    "ecoformer": ["torch>=2.10", "torchvision", "pyyaml", 'pytest; extra == "dev"'],
    "torch": ["nvidia-cublas==1.2; platform_system == 'Linux'"],
    "torchvision": ["torch==2.13.0", "scipy<1; extra == 'scipy'"],
    "pyyaml": [],
}
VERSIONS = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "pyyaml": "6.0"}


def test_versions_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = install(monkeypatch, VERSIONS, NEEDS)
    assert "ok: torch 2.13.0+cpu, torchvision 0.28.0, pyyaml 6.0" in lines
    assert not any(line.startswith("problem") for line in lines)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"torch": "2.9.1"}, "torch 2.9.1 is installed where torch>=2.10 is needed; they come in"),
        ({"torch": "2.14.0"}, "torchvision 0.28.0 needs torch==2.13.0, not torch 2.14.0; they"),
        ({"pyyaml": ""}, "pyyaml is not installed; pip install 'pyyaml'."),
    ],
)
def test_versions_that_do_not_fit(
    change: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {name: version for name, version in (VERSIONS | change).items() if version}
    lines = install(monkeypatch, versions, NEEDS)
    assert any(line.startswith(f"problem: {expected}") for line in lines), lines


def test_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    # As Python marks a module that must not be imported.
    monkeypatch.setitem(sys.modules, "torchvision", None)
    lines = install(monkeypatch, VERSIONS, NEEDS)
    (line,) = (line for line in lines if line.startswith("problem"))
    assert line.startswith("problem: torchvision 0.28.0 cannot be imported (ModuleNotFoundError")
    assert line.endswith("pip uninstall torch torchvision, then pip install torch torchvision.")


def test_clone_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {**NEEDS, "timm": ["torch"]}
    del needs["ecoformer"]
    lines = install(monkeypatch, VERSIONS | {"timm": "1.0"}, needs)
    assert any(line.startswith("note: ecoformer is not installed here") for line in lines)
    assert "ok: torch 2.13.0+cpu, torchvision 0.28.0, timm 1.0" in lines


def test_little_shared_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64e6))
    lines = examine(checks.check_environment)
    assert ("--shm-size" in lines[-1]) == Path("/dev/shm").is_dir()


def test_driver_that_pytorch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks, "_driver_version", lambda: None)
    assert examine(checks.check_gpu) == ["note: no GPU here, so runs compute on the CPU."]
    monkeypatch.setattr(checks, "_driver_version", lambda: "470.82.01")
    (line,) = examine(checks.check_gpu)
    assert line.startswith("problem: driver 470.82.01 is here, but PyTorch")


def test_gpu_memory_that_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "V100")
    first, second = examine(checks.check_gpu)
    assert first.startswith("ok: GPU 0: V100, ")
    assert "1.0 of 16.0 GiB free, no bfloat16" in first
    assert second.startswith("note: GPU 0: V100: others hold more than half")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
@pytest.mark.parametrize("check", [checks.check_gpu, checks.check_training_step])
def test_device_that_is_not_there(
    check: Callable[[argparse.Namespace], Iterator[Finding]],
) -> None:
    assert examine(check, device="cuda")[-1].startswith("problem: CUDA device 0 was asked for")


@pytest.mark.parametrize(
    ("reason", "name", "end"),
    [("", "native", str(library.library_path())), ("no g++", "blocked", "C++ kernels: no g++.")],
)
def test_the_backend_is_named_and_why_it_is_no_faster_one(
    reason: str, name: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reason and library.load():
        pytest.skip(library.load())
    monkeypatch.setattr(library, "_reason", reason)
    (line,) = examine(checks.check_attention, device="cpu")
    assert line.startswith(f"{'note' if reason else 'ok'}: attention on cpu runs by the backend")
    assert f"backend {name!r}" in line and line.endswith(end)


@pytest.mark.gpu
def test_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in ("ok       GPU 0: ", "hash fit on cuda:0", "nccl works"):
        assert part in out


def test_step_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(checks, "fit_hash_functions", fail)
    (line,) = examine(checks.check_training_step)
    assert line.startswith(
        "problem: the check of the training step fails (RuntimeError: no kernel image is available)"
    )


def test_loss_that_is_not_finite_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.F, "cross_entropy", lambda logits, _: logits.sum() * float("nan"))
    (line,) = examine(checks.check_training_step)
    assert line.startswith("problem: ") and "a loss of nan" in line


def test_gloo_that_cannot_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    (line,) = examine(checks.check_process_groups)
    assert line.startswith("problem: gloo does not work (")
    assert "GLOO_SOCKET_IFNAME" in line
    assert not torch.distributed.is_initialized()
