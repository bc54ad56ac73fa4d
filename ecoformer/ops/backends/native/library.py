"""Compile the kernels once, keep the library where PyTorch keeps extensions, and load it.

``ECOFORMER_NATIVE=0`` leaves them out. One process compiles while others wait for it; a library is
put in its place whole, so that nothing interrupted leaves a broken one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ecoformer.errors import describe_error
from ecoformer.ranks import gather_objects

_logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # Nothing here reads what these would keep.
    "-fno-math-errno",
    "-fno-trapping-math",
    # As of one operation, also where the standard's C++ would round in between.
    "-ffp-contract=fast",
    # The stable interface of the oldest PyTorch that this package takes, 2.10.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
_COMPILE_SECONDS = 300

_lock = threading.Lock()
# Why it is not loaded; empty where it is, None where nobody has tried.
_reason: str | None = None


class _BuildError(Exception):
    """In one line, what the compiler or the disk refused."""


def load() -> str:
    """Load the library, compiled first where it is not in the cache; later calls do nothing.

    Returns:
        Why it cannot be loaded, in words; empty where it is.
    """
    global _reason
    if _reason is None:
        with _lock:
            if _reason is None:
                _reason = _load()
                if _reason and _is_wanted():
                    _logger.info("Attention on the CPU runs without its C++ kernels: %s.", _reason)
    return _reason


def agree() -> None:
    """Load the library on all ranks, or on none: they are to round alike."""
    global _reason
    reasons = [reason for reason in gather_objects(load()) if reason]
    if reasons and not _reason:
        _reason = f"another rank cannot load them ({reasons[0]})"


def library_path() -> Path:
    """Give the library's place in the cache: a function of sources, flags, PyTorch and machine."""
    from torch._appdirs import user_cache_dir

    digest = hashlib.sha256()
    for part in (*_FLAGS, torch.__version__, platform.machine()):
        digest.update(part.encode() + b"\0")
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or user_cache_dir("torch_extensions")
    return Path(root).absolute() / "ecoformer" / f"native-{digest.hexdigest()[:16]}.so"


def _is_wanted() -> bool:
    return os.environ.get("ECOFORMER_NATIVE") != "0"


def _load() -> str:
    if not _is_wanted():
        return "ECOFORMER_NATIVE=0 leaves them out"
    if sys.platform != "linux":
        return f"they are built on Linux only, not on {sys.platform}"
    path = library_path()
    try:
        if not path.exists():
            _build(path)
        try:
            torch.ops.load_library(path)
        except OSError:
            # Whatever happened to the file; or it comes from a machine with newer libraries.
            _build(path, is_replaced=True)
            torch.ops.load_library(path)
    except (_BuildError, OSError) as error:
        return str(error) if isinstance(error, _BuildError) else describe_error(error)
    _register()
    return ""


def _build(path: Path, *, is_replaced: bool = False) -> None:
    asked = time.time()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held(path.with_suffix(".lock")) as is_alone:
            if is_alone:
                # Of those that were killed; another library may be in the making beside this one.
                for begun in path.parent.glob(f"{_prefix(path)}*"):
                    shutil.rmtree(begun, ignore_errors=True)
            # One that came while this process waited is no more the one to be replaced.
            is_there = path.exists() and (not is_replaced or path.stat().st_mtime > asked)
            # Who waited need not repeat what failed meanwhile.
            failure = path.with_suffix(".failed")
            if not is_there and failure.exists() and failure.stat().st_mtime > asked:
                raise _BuildError(failure.read_text("utf-8"))
            if not is_there:
                try:
                    _compile(path)
                except _BuildError as error:
                    failure.write_text(str(error), "utf-8")
                    raise
                failure.unlink(missing_ok=True)
    except OSError as error:
        raise _BuildError(
            f"their cache cannot be written ({error.strerror}: {path.parent}); set "
            "TORCH_EXTENSIONS_DIR to a folder that can"
        ) from error


@contextmanager
def _held(lock: Path) -> Iterator[bool]:
    """Hold a lock file for a block; it falls with the process that holds it.

    Yields:
        False where the file system has no locks: some may do the same work twice.
    """
    import fcntl

    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _compile(path: Path) -> None:
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise _BuildError(f"there is no C++ compiler ({compiler}); install g++, or set CXX")
    _logger.warning("Compiling the CPU kernels into %s, once; this takes some 10 s.", path.parent)
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    libraries = [f(folder) for folder in cpp_extension.library_paths() for f in _LINK_FLAGS]
    with tempfile.TemporaryDirectory(prefix=_prefix(path), dir=path.parent) as folder:
        objects = {
            Path(folder, source.stem + ".o"): source for source in sorted(_SOURCES.glob("*.cpp"))
        }
        _run(
            *(
                [compiler, *_FLAGS, *includes, "-c", str(source), "-o", str(output)]
                for output, source in objects.items()
            )
        )
        built = Path(folder, path.name)
        _run([compiler, "-shared", *map(str, objects), *libraries, "-ltorch_cpu", "-o", str(built)])
        os.replace(built, path)


def _prefix(path: Path) -> str:
    """How folders begin in which a library is made."""
    return f"building-{path.stem}-"


_LINK_FLAGS = ("-L{}".format, "-Wl,-rpath,{}".format)


def _run(*commands: list[str]) -> None:
    """Run commands at the same time."""
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(command, stdout=output, stderr=output) for command in commands
        ]
        deadline = time.monotonic() + _COMPILE_SECONDS
        try:
            codes = [process.wait(deadline - time.monotonic()) for process in processes]
        except subprocess.TimeoutExpired:
            raise _BuildError(f"{commands[0][0]} takes more than {_COMPILE_SECONDS} s") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            output.seek(0)
            lines = output.read().splitlines()
            line = next((line for line in lines if "error" in line), "no output")
            raise _BuildError(f"{commands[0][0]} fails ({line.strip()[:200]})")


def _register() -> None:
    """Tell PyTorch the shapes that the operators give, for tracing. They have no gradient."""
    from ecoformer.ops.backends.base import empty_rows

    def shape(
        q: Tensor, v: Tensor, anchors: Tensor, weight: Tensor, *rest: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_images, num_heads, _, head_dim = v.shape
        sums = v.new_empty(
            num_images, num_heads, weight.shape[1] + 1, head_dim + 1, dtype=torch.float32
        )
        return empty_rows(v), sums, sums.new_empty(num_images, num_heads)

    torch.library.register_fake("ecoformer_native::forward", shape)
    torch.library.register_fake(
        "ecoformer_native::backward", lambda grad, q, v, *_: (empty_rows(q), empty_rows(v))
    )
