"""Look at environment, GPU, data, output folder and one small training step.

A check yields findings, and raises ``InputError`` where it cannot go on.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ecoformer.engine.launch import choose_device
from ecoformer.engine.logs import track
from ecoformer.engine.precision import autocast, choose_amp_dtype, create_scaler
from ecoformer.errors import InputError, describe_error
from ecoformer.files import open_atomic
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import fit_hash_functions
from ecoformer.models.registry import find_family
from ecoformer.ops.backends import default_backend
from ecoformer.ops.backends.native import library

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from ecoformer.data.datasets import LabelledSamples
    from ecoformer.data.loaders import BadImage

# Looked at also where ecoformer, which names all that it needs, is not installed.
_MAIN_LIBRARIES = ("torch", "torchvision", "timm")
# Modules that are called otherwise than what pip installs.
_MODULES = {
    "mmengine-lite": "mmengine",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
_REINSTALL_TORCH = "pip uninstall torch torchvision, then pip install torch torchvision"

_WITHOUT_FILES = ("DIGITS", "PAIRS", "SCENES", "LISTOPS", "PATHFINDER", "PIXELS")
_NUM_QUICK_IMAGES = 1000
_IMAGES_A_MESSAGE = 32
# Ten workers, two batches each of 32 images of 224 pixels.
_LEAST_SHARED_BYTES = 400e6
# The largest models save 1 GB, and at times three files of it lie there.
_LEAST_DISK_BYTES = 3e9
_PROBE_BYTES = 32 * 2**20
_STEP_SIZE, _STEP_BATCH = 32, 8


class Finding(NamedTuple):
    """What a check has seen, in one line, and what to do about it where it is no ``ok``."""

    level: Literal["ok", "note", "problem"]
    message: str


def run_check(
    check: Callable[[argparse.Namespace], Iterator[Finding]], options: argparse.Namespace
) -> Iterator[Finding]:
    """Turn what stops a check into its last finding: the others can still tell something."""
    try:
        yield from check(options)
    except InputError as error:
        yield Finding("problem", str(error))
    # What is broken here raises anything.
    except Exception as error:
        what = check.__name__.removeprefix("check_").replace("_", " ")
        yield Finding(
            "problem",
            f"the check of the {what} fails ({describe_error(error)}); look for it in "
            "environment/README.md.",
        )


def check_environment(options: argparse.Namespace) -> Iterator[Finding]:
    """Look at Python, the libraries, their versions, and shared memory."""
    from packaging.requirements import Requirement

    from ecoformer.data.loaders import num_cores

    yield Finding("ok", f"Python {platform.python_version()} on {num_cores()} cores")
    try:
        needed = _requirements("ecoformer")
    except metadata.PackageNotFoundError:
        needed = [Requirement(name) for name in _MAIN_LIBRARIES]
        yield Finding(
            "note",
            "ecoformer is not installed here, so only its main libraries are looked at; "
            "pip install --editable . in the clone.",
        )
    faults = {requirement.name: _find_fault(requirement, needed) for requirement in needed}
    for fault in filter(None, faults.values()):
        yield Finding("problem", fault)
    good = [f"{name} {metadata.version(name)}" for name, fault in faults.items() if not fault]
    if good:
        yield Finding("ok", ", ".join(good))

    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < _LEAST_SHARED_BYTES:
        yield Finding(
            "note",
            f"{free / 1e6:.0f} MB of shared memory are few for data workers, which end by a bus "
            "error without; docker run --ipc=host or --shm-size=8g, or train with --num_workers 0.",
        )


def _requirements(package: str) -> list[Requirement]:
    """List what an installed package needs, extras left out."""
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in metadata.requires(package) or []]
    return [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]


def _find_fault(requirement: Requirement, others: Sequence[Requirement]) -> str | None:
    """Say what is wrong with a library, alone or beside the others; None where all is well."""
    name = requirement.name
    remedy = f"pip install --upgrade --force-reinstall '{requirement}'"
    if name in ("torch", "torchvision"):
        remedy = f"they come in pairs of one build: {_REINSTALL_TORCH}"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed; pip install '{requirement}'."
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{name} {version} is installed where {requirement} is needed; {remedy}."
    names = {other.name for other in others}
    for inner in _requirements(name):
        if inner.name not in names:
            continue
        try:
            found = metadata.version(inner.name)
        except metadata.PackageNotFoundError:
            # Its own turn comes.
            continue
        if not inner.specifier.contains(found, prereleases=True):
            return f"{name} {version} needs {inner}, not {inner.name} {found}; {remedy}."
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:
        return f"{name} {version} cannot be imported ({describe_error(error)}); {remedy}."
    return None


def check_gpu(options: argparse.Namespace) -> Iterator[Finding]:
    """Look at the driver and at each GPU, or say why there is none to use."""
    driver = _driver_version()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_usable = torch.cuda.is_available()
    if is_usable:
        for index in range(torch.cuda.device_count()):
            yield from _check_gpu(index, driver)
    elif driver:
        reason = f" ({' '.join(str(caught[0].message).split())})" if caught else ""
        yield Finding(
            "problem",
            f"driver {driver} is here, but PyTorch {torch.__version__} of CUDA "
            f"{torch.version.cuda} sees no GPU{reason}; look at CUDA_VISIBLE_DEVICES and "
            "nvidia-smi, or install the PyTorch that fits the driver.",
        )
    else:
        yield Finding("note", "no GPU here, so runs compute on the CPU.")
    choose_device(options.device)


def _check_gpu(index: int, driver: str | None) -> Iterator[Finding]:
    free, total = torch.cuda.mem_get_info(index)
    has_bfloat16 = torch.cuda.get_device_capability(index) >= (8, 0)
    gpu = f"GPU {index}: {torch.cuda.get_device_name(index)}"
    memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    bfloat16 = "bfloat16" if has_bfloat16 else "no bfloat16 (--amp-dtype float16, as by default)"
    yield Finding(
        "ok",
        f"{gpu}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}, {memory}, {bfloat16}",
    )
    if free < total / 2:
        yield Finding(
            "note", f"{gpu}: others hold more than half of its memory; nvidia-smi names them."
        )


def _driver_version() -> str | None:
    """Read the version of NVIDIA's kernel module, where it is loaded."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+(?:\.\d+)+", file.read_text()) if file.exists() else None
    return found[0] if found else None


def check_data(options: argparse.Namespace) -> Iterator[Finding]:
    """Look at both splits, decode their images, and name each bad one."""
    from ecoformer.data.digits import SPLITS
    from ecoformer.data.loaders import require_equal_classes

    if options.data_path is None and options.data_set not in _WITHOUT_FILES:
        yield Finding("note", "no data were looked at; name them by --data-path and --data-set.")
        return
    splits: dict[str, LabelledSamples] = {}
    for split in SPLITS:
        try:
            splits[split] = _open_split(options.data_set, options.data_path, split)
        except InputError as error:
            yield Finding("problem", str(error))
    if len(splits) == len(SPLITS):
        try:
            require_equal_classes(*(splits[split].class_names for split in SPLITS))
        except InputError as error:
            yield Finding("problem", str(error))
    for split, images in splits.items():
        # Where there are no files, none can be bad.
        is_quick = options.quick or options.data_path is None
        yield from _decode(split, images, is_quick=is_quick)


def _open_split(name: str, path: str | None, split: str) -> LabelledSamples:
    """Open a split as the task does that the data set is for."""
    from ecoformer.config.schema import Config
    from ecoformer.data import dense, sequences
    from ecoformer.data.datasets import open_dataset

    defaults = Config()
    if name in sequences.DATA_SETS:
        max_tokens = defaults.model.max_tokens
        return sequences.open_sequences(name, path, split, max_tokens=max_tokens)
    # Canvases for both tasks are the same, and maps need no pycocotools.
    if name in dense.LABEL_MAP_SETS:
        return dense.open_label_maps(name, path, split, side=defaults.data.short_side)
    if name in dense.BOX_SETS:
        return dense.open_boxes(name, path, split, side=defaults.data.short_side)
    return open_dataset(name, path, split, input_size=_STEP_SIZE)


class _Decoder(Dataset["BadImage | None"]):
    """Reads an image and returns it only if it is bad."""

    def __init__(self, images: LabelledSamples) -> None:
        self.images = images

    def __getitem__(self, index: int) -> BadImage | None:
        from ecoformer.data.loaders import describe_failure

        try:
            self.images.read(index)
        # Pillow raises whatever its decoders meet.
        except Exception as error:
            return index, describe_failure(error)
        return None


def _decode(split: str, images: LabelledSamples, *, is_quick: bool) -> Iterator[Finding]:
    from ecoformer.data.loaders import num_cores
    from ecoformer.data.workers import prepare_worker

    indices: Sequence[int] = range(len(images))
    if is_quick and len(indices) > _NUM_QUICK_IMAGES:
        indices = sorted(random.Random(0).sample(indices, _NUM_QUICK_IMAGES))
    loader = DataLoader(
        _Decoder(images),
        sampler=indices,
        batch_size=_IMAGES_A_MESSAGE,
        collate_fn=list,
        num_workers=num_cores(),
        worker_init_fn=prepare_worker,
        # A forked worker shares the file names of this process.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    bad: list[BadImage] = []
    began = time.monotonic()
    outcomes = (outcome for outcomes in loader for outcome in outcomes)
    for outcome in track(
        outcomes, f"decoding {split}", total=len(indices), note=lambda: f"{len(bad)} bad"
    ):
        if outcome is not None:
            bad.append(outcome)
    rate = len(indices) / (time.monotonic() - began)
    yield Finding(
        "note" if bad else "ok",
        f"{split}: {len(images):,} images of {len(images.class_names):,} classes; of "
        f"{len(indices):,} decoded {len(bad) or 'none'} bad, {rate:,.0f} images/s by "
        f"{num_cores()} processes",
    )
    for index, reason in bad:
        found = f"cannot read {images.describe(index)} ({reason})"
        yield Finding("problem", f"{found}; replace or delete it.")


def check_output(options: argparse.Namespace) -> Iterator[Finding]:
    """Look at the room in the output folder, and save a file there as a checkpoint is saved."""
    folder: Path = options.output_dir.absolute()
    # Nothing is made that was not there.
    parent = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor.", dir=parent) as probe:
            began = time.monotonic()
            with open_atomic(Path(probe, "probe")) as file:
                file.write(bytes(_PROBE_BYTES))
            seconds = time.monotonic() - began
    except OSError as error:
        raise InputError(
            f"--output_dir {folder} cannot be written ({error.strerror}: {parent}); get the right "
            "to write there, or choose another."
        ) from error
    free = shutil.disk_usage(parent).free
    rate = _PROBE_BYTES / 1e6 / seconds
    yield Finding(
        "ok", f"{folder}: {free / 1e9:,.1f} GB free, files are saved whole at {rate:,.0f} MB/s"
    )
    if free < _LEAST_DISK_BYTES:
        yield Finding(
            "note",
            f"{folder}: a run of the largest models takes {_LEAST_DISK_BYTES / 1e9:.0f} GB at "
            "times; free some or choose another --output_dir.",
        )


def check_attention(options: argparse.Namespace) -> Iterator[Finding]:
    """Look which backend attends, and on a CPU why it is not the one in C++."""
    device = choose_device(options.device)
    where = f"attention on {device} runs by the backend {default_backend(device).name!r}"
    if device.type != "cpu":
        yield Finding("ok", where)
    elif reason := library.load():
        yield Finding("note", f"{where}, at about half the speed of the C++ kernels: {reason}.")
    else:
        vectors = torch.ops.ecoformer_native.vectors()
        yield Finding("ok", f"{where}, {vectors} vectors, compiled into {library.library_path()}")


def check_training_step(options: argparse.Namespace) -> Iterator[Finding]:
    """Fit the hash functions of a PVTv2 on small noise and train it for a step."""
    device = choose_device(options.device)
    amp_dtype = choose_amp_dtype(None, device)
    began = time.monotonic()
    variant, hashing = "pvt_v2_b0", HashConfig(num_fit_steps=2)
    model = find_family(variant).create_model(variant, num_classes=2, hashing=hashing).to(device)
    images = torch.randn(_STEP_BATCH, 3, _STEP_SIZE, _STEP_SIZE, device=device)
    targets = torch.arange(_STEP_BATCH, device=device) % 2
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = create_scaler(device, amp_dtype)
    fit_hash_functions(model, images)
    with autocast(device, amp_dtype):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), targets)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    value = loss.item()
    seconds = time.monotonic() - began
    where = f"a training step with a hash fit on {device}"
    if not math.isfinite(value):
        yield Finding(
            "problem", f"{where} gives a loss of {value}; try --device cpu, or another PyTorch."
        )
    else:
        yield Finding("ok", f"{where} in {seconds:.1f} s, {amp_dtype}".replace("torch.", ""))


def check_process_groups(options: argparse.Namespace) -> Iterator[Finding]:
    """Let this process talk to itself through what ranks talk through: gloo, NCCL on CUDA."""
    device = choose_device(options.device)
    devices = {"gloo": torch.device("cpu")}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        devices["nccl"] = device
    for backend, home in devices.items():
        if not dist.is_backend_available(backend):
            yield Finding(
                "problem",
                f"this PyTorch has no {backend}, by which ranks talk; {_REINSTALL_TORCH}.",
            )
            continue
        try:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            try:
                dist.all_reduce(torch.ones(1, device=home))
            finally:
                dist.destroy_process_group()
        except RuntimeError as error:
            yield Finding(
                "problem",
                f"{backend} does not work ({describe_error(error)}); name the network interface in "
                f"{backend.upper()}_SOCKET_IFNAME, lo on one machine.",
            )
        else:
            yield Finding("ok", f"{backend} works")


CHECKS = (
    check_environment,
    check_gpu,
    check_data,
    check_output,
    check_attention,
    check_training_step,
    check_process_groups,
)
