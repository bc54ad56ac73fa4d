"""What importing may do: nothing that a reader of the line would not expect.

Which module may import which stands in pyproject.toml, and ``make lint`` holds it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = [file for name in ("ecoformer", "pvt", "twins") for file in (ROOT / name).rglob("*.py")]
OURS = {str(file) for file in FILES}
# Help, and the refusal of a wrong flag, must not wait for torch.
TORCH_FREE = [
    *("ecoformer.errors", "ecoformer.files", "ecoformer.hash_config", "ecoformer.models.registry"),
    *("ecoformer.config", "ecoformer.tasks", "ecoformer.engine.command", "ecoformer.tools"),
    *("ecoformer.__main__", "pvt.main", "pvt.family", "twins.main", "twins.family"),
]
IMPURE = {"open", "os.mkdir", "os.putenv", "os.remove", "os.scandir", "socket.connect"}
IMPURE |= {"os.system", "subprocess.Popen"}


def refuse(action: str) -> None:
    """Raise if a module of ours asks for this while it is imported; a library of its may."""
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        if frame.f_code.co_filename in OURS:
            raise AssertionError(f"{action} while importing {frame.f_globals['__name__']}")
        frame = frame.f_back  # type: ignore[assignment]


def watch(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        refuse(name)
        return function(*args, **kwargs)

    return watched


def audit(event: str, args: tuple[Any, ...]) -> None:
    # Decorators and warnings read the source that they stand in.
    if event in IMPURE and not str(args[0]).endswith((".py", ".pyc")):
        refuse(event)


def import_all() -> None:
    """Import every module, in a process that is for nothing else."""
    import torch

    class Arguments(list[str]):
        pass

    for name in ("__getitem__", "__iter__", "__len__"):
        setattr(Arguments, name, watch(getattr(list, name), "sys.argv"))
    for name in ("_lazy_init", "current_device", "device_count", "init", "is_available"):
        setattr(torch.cuda, name, watch(getattr(torch.cuda, name), f"torch.cuda.{name}"))
    sys.argv = Arguments(["import_all", "--no-such-flag"])
    sys.addaudithook(audit)
    for file in FILES:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        import_module(name.removesuffix(".__init__"))


def run_python(code: str) -> None:
    """Run a fresh process, whose traceback pytest shows if it fails."""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_importing_reads_no_argument_opens_no_file_and_touches_no_device() -> None:
    run_python("from tests.test_imports import import_all; import_all()")


def test_help_needs_no_torch() -> None:
    # An import of what is None fails.
    code = "import sys; sys.modules.update(torch=None, timm=None, numpy=None); import "
    run_python(code + ", ".join(TORCH_FREE))


def test_no_file_is_loaded_that_could_run_code() -> None:
    tests = [file for name in ("tests", "configs") for file in (ROOT / name).rglob("*.py")]
    for file in FILES + tests:
        for call in re.findall(r"(?<!safetensors\.)torch\.load\(.*", file.read_text()):
            assert "weights_only=True" in call, file
