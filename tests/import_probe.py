"""Import every module of a source tree in a fresh process and print what the imports did.

Run as ``python tests/import_probe.py TREE``; prints a JSON list, empty when importing is pure.
Only what the tree's own code does counts: a library that is imported may open what it likes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGES = ("ecoformer", "pvt", "twins")
CUDA_FUNCTIONS = ("_lazy_init", "current_device", "device_count", "init", "is_available")
IMPURE_EVENTS = (
    "open",
    "os.listdir",
    "os.mkdir",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.scandir",
    "os.system",
    "socket.connect",
    "subprocess.Popen",
)


class Probe:
    """Collects what happens while a module of the tree is the one that runs."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.packages = tuple(f"{tree / package}{os.sep}" for package in PACKAGES)
        self.findings: list[str] = []

    def record(self, action: str) -> None:
        """Note an action if the tree's code asked for it, not a library that it imports."""
        frame: FrameType | None = sys._getframe(1)
        while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
            file = frame.f_code.co_filename
            if file.startswith(self.packages):
                finding = f"{Path(file).relative_to(self.tree)}:{frame.f_lineno}: {action}"
                if finding not in self.findings:
                    self.findings.append(finding)
                return
            frame = frame.f_back

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Hook for ``sys.addaudithook``."""
        # Decorators and warnings read the source that they stand in.
        is_source = event == "open" and str(arguments[0]).endswith((".py", ".pyc"))
        if event in IMPURE_EVENTS and not is_source:
            self.record(f"{event} while importing")

    def watch(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap a function so that a call at import is noted."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.record(f"{name} called while importing")
            return function(*args, **kwargs)

        return watched


def module_name(file: Path, tree: Path) -> str:
    """Dotted name of a source file of the tree."""
    parts = file.relative_to(tree).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level_modules() -> set[str]:
    """Names of all packages that are imported by now."""
    return {name.partition(".")[0] for name in sys.modules}


def main(tree: Path) -> int:
    """Import the tree and print the findings."""
    import torch

    probe = Probe(tree)
    files = [file for package in PACKAGES for file in (tree / package).rglob("*.py")]
    before = top_level_modules()

    class Arguments(list[str]):
        """Command line that tells who reads it."""

        def __getitem__(self, index: Any) -> Any:
            probe.record("sys.argv read while importing")
            return super().__getitem__(index)

        def __iter__(self) -> Iterator[str]:
            probe.record("sys.argv read while importing")
            return super().__iter__()

        def __len__(self) -> int:
            probe.record("sys.argv read while importing")
            return super().__len__()

    sys.argv = Arguments(["probe", "--no-such-flag", "no-such-file"])
    sys.path.insert(0, str(tree))
    for name in CUDA_FUNCTIONS:
        setattr(torch.cuda, name, probe.watch(getattr(torch.cuda, name), f"torch.cuda.{name}"))
    sys.addaudithook(probe.audit)

    # "ecoformer" itself is the first, so that all it brings along is its own doing.
    for module in sorted(module_name(file, tree) for file in files):
        try:
            importlib.import_module(module)
        # SystemExit above all: an argument parser that runs at import raises it.
        except BaseException as error:
            probe.findings.append(f"{module}: import raised {type(error).__name__}: {error}")
        if module == "ecoformer":
            known = before | sys.stdlib_module_names | {"ecoformer"}
            extra = sorted(top_level_modules() - known)
            if extra:
                probe.findings.append(f"ecoformer: import also imports {', '.join(extra)}")

    print(json.dumps(probe.findings))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]).resolve()))
