"""Rules of the house: who imports whom, importing is pure, nothing unsafe, all of it explained.

Each rule reads a source tree and yields one line a violation. The rules are tested themselves,
on small trees that break them and on small trees that come close.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.import_probe import PACKAGES, module_name

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Layer:
    """Modules of one height, and what they may know.

    Args:
        modules: dotted prefixes.
        may_import: names of other layers.
        may_import_late: layers allowed inside functions only.
        libraries: the only third-party packages allowed; ``None`` allows any.
    """

    modules: tuple[str, ...]
    may_import: tuple[str, ...] = ()
    may_import_late: tuple[str, ...] = ()
    libraries: frozenset[str] | None = None


# The one name that all may take from the package itself.
VERSION = "ecoformer.__version__"
TORCH = frozenset({"torch"})
METHOD = ("base", "ops", "hashing", "attention", "layers", "family")
STACK = ("config", "data", "checkpoint", "cost", "engine")
LAYERS = {
    "base": Layer(
        (VERSION, *(f"ecoformer.{name}" for name in ("errors", "files", "measure", "seeding"))),
        libraries=TORCH | {"numpy"},
    ),
    "ops": Layer(("ecoformer.ops",), ("base", "kernel choice"), ("kernels",), libraries=TORCH),
    "kernel choice": Layer(("ecoformer.ops.backends.triton",), libraries=TORCH),
    "kernels": Layer(
        ("ecoformer.ops.backends.triton.kernels", "ecoformer.ops.backends.triton.launch"),
        ("ops", "kernel choice"),
        libraries=TORCH | {"triton"},
    ),
    "hashing": Layer(("ecoformer.hashing",), ("base", "ops"), libraries=TORCH),
    "attention": Layer(("ecoformer.attention",), ("base", "ops", "hashing"), libraries=TORCH),
    "layers": Layer(
        ("ecoformer.models.pyramid", "ecoformer.models.mlp"),
        ("base", "hashing", "attention"),
        libraries=TORCH | {"timm"},
    ),
    "family": Layer(
        ("ecoformer.models.registry",), ("base",), ("checkpoint",), libraries=TORCH | {"timm"}
    ),
    "pvt": Layer(("pvt",), METHOD, libraries=TORCH | {"timm"}),
    "twins": Layer(("twins",), METHOD, libraries=TORCH | {"timm"}),
    "config": Layer(("ecoformer.config",), ("base", "ops", "hashing", "family")),
    "data": Layer(("ecoformer.data",), ("base", "config")),
    "checkpoint": Layer(("ecoformer.checkpoint",), METHOD),
    "cost": Layer(("ecoformer.cost",), (*METHOD, "config", "checkpoint")),
    "engine": Layer(("ecoformer.engine",), (*METHOD, "config", "data", "checkpoint", "cost")),
    "figures": Layer(("ecoformer.tools.figures",), ("base",)),
    "package": Layer(("ecoformer",), (*METHOD, *STACK)),
    "pvt commands": Layer(("pvt.main", "pvt.get_energy"), (*METHOD, *STACK, "pvt")),
    "twins commands": Layer(("twins.main", "twins.get_energy"), (*METHOD, *STACK, "twins")),
    "commands": Layer(
        tuple(f"ecoformer.{name}" for name in ("benchmark", "demo", "doctor", "plots", "tables")),
        (*METHOD, *STACK, "figures", "kernel choice"),
        ("package", "pvt", "twins"),
    ),
}
# Slow to import, and only a few runs need them.
LATE_LIBRARIES = {"matplotlib", "mmengine", "sklearn", "tensorboard", "torch.utils.tensorboard"}
EXITS = {"exit", "quit", "sys.exit"}
# Annotations of functions that give nothing back; the last one is that of a bare context.
NOTHING = {"None", "Never", "NoReturn", "Iterator[None]"}


@dataclass(frozen=True)
class Module:
    """One parsed source file."""

    name: str
    path: str
    body: ast.Module
    is_package: bool

    @property
    def is_shipped(self) -> bool:
        """Whether the file belongs to an installed package, rather than to the tests."""
        return self.name.partition(".")[0] in PACKAGES


@dataclass(frozen=True)
class Import:
    """One imported module, and whether only a function call imports it."""

    target: str
    line: int
    is_late: bool


Tree = dict[str, Module]
Rule = Callable[[Tree], Iterator[str]]


def read_tree(root: Path) -> Tree:
    """Parse the packages, tests and configurations under ``root``, by dotted name."""
    tree = {}
    for top in (*PACKAGES, "configs", "tests"):
        for file in sorted((root / top).rglob("*.py")):
            path = str(file.relative_to(root))
            name = module_name(file, root)
            body = ast.parse(file.read_text(encoding="utf-8"), filename=path)
            tree[name] = Module(name, path, body, is_package=file.name == "__init__.py")
    return tree


def imports_of(module: Module, tree: Tree) -> Iterator[Import]:
    """Yield what a module imports, functions and string arguments of import calls included."""

    def visit(node: ast.AST, is_late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, is_late)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.name.split(".")
                parents = parents[: len(parents) - node.level + module.is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = full in tree or full in {VERSION, *LATE_LIBRARIES}
                yield Import(full if is_module else base, node.lineno, is_late)
        elif isinstance(node, ast.Call) and dotted_name(node.func).endswith(
            ("import_module", "__import__")
        ):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(first.value, node.lineno, is_late)
        is_late |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        is_late |= isinstance(node, ast.If) and dotted_name(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_late)

    yield from visit(module.body, False)


def dotted_name(node: ast.AST) -> str:
    """Return ``a.b.c`` for a chain of names, and an empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return ""


def layer_of(name: str) -> str | None:
    """Layer of the longest matching prefix; the bare ``ecoformer`` matches itself alone."""
    best, best_length = None, 0
    for layer, entry in LAYERS.items():
        for prefix in entry.modules:
            is_inside = prefix != "ecoformer" and name.startswith(f"{prefix}.")
            is_inside |= name == prefix
            if is_inside and len(prefix) > best_length:
                best, best_length = layer, len(prefix)
    return best


def rule_import_direction(tree: Tree) -> Iterator[str]:
    """Imports point down the table of layers."""
    for module in filter(lambda module: module.is_shipped, tree.values()):
        layer = layer_of(module.name)
        if layer is None:
            yield f"{module.path}: {module.name} has no place in the table of layers"
            continue
        for found in imports_of(module, tree):
            if found.target.partition(".")[0] not in PACKAGES:
                continue
            target = layer_of(found.target)
            allowed = {layer, *LAYERS[layer].may_import}
            allowed |= set(LAYERS[layer].may_import_late) if found.is_late else set()
            if target not in allowed:
                yield f"{module.path}:{found.line}: {layer} may not import {found.target} here"


def rule_libraries(tree: Tree) -> Iterator[str]:
    """The method needs torch only, and no module brings along what few runs need."""
    for module in filter(lambda module: module.is_shipped, tree.values()):
        layer = layer_of(module.name)
        libraries = LAYERS[layer].libraries if layer else None
        for found in imports_of(module, tree):
            top = found.target.partition(".")[0]
            if top in PACKAGES or top in sys.stdlib_module_names:
                continue
            if libraries is not None and top not in libraries:
                yield f"{module.path}:{found.line}: {layer} may not import {top}"
            if not found.is_late and {top, found.target} & LATE_LIBRARIES:
                yield f"{module.path}:{found.line}: import {found.target} where it is used"


def rule_safe_load(tree: Tree) -> Iterator[str]:
    """A file that is loaded never runs code."""
    for module in tree.values():
        for node in ast.walk(module.body):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            value = given.get("weights_only")
            is_load = dotted_name(node.func) == "torch.load"
            is_safe = isinstance(value, ast.Constant) and value.value is True
            if (is_load or value is not None) and not is_safe:
                yield f"{module.path}:{node.lineno}: load with weights_only=True, written out"


def rule_no_exit(tree: Tree) -> Iterator[str]:
    """Only the guard at the end of a command ends the process."""

    def visit(node: ast.AST, path: str) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            return
        is_exit = isinstance(node, ast.Call) and dotted_name(node.func) in EXITS
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            is_exit |= dotted_name(raised) == "SystemExit"
        if is_exit:
            line = getattr(node, "lineno", 0)
            yield f"{path}:{line}: raise an error of ecoformer.errors, do not exit"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, path)

    for module in filter(lambda module: module.is_shipped, tree.values()):
        yield from visit(module.body, module.path)


def docstring_faults(node: ast.FunctionDef | ast.AsyncFunctionDef, doc: str) -> Iterator[str]:
    """Yield what a function's docstring leaves out, or tells of what is not there."""
    parts = re.split(r"^(\w+):$", doc, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    given = node.args
    named = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    names = [arg.arg for arg in named if arg and arg.arg not in {"self", "cls"}]
    told = re.findall(r"^    (\w+): ", sections.get("Args", ""), re.MULTILINE)
    # Pointers, strides and sizes of a GPU's kernel are told of where it is launched.
    is_kernel = any(dotted_name(entry) == "triton.jit" for entry in node.decorator_list)
    if told != names and not is_kernel:
        yield f"takes ({', '.join(names)}), and its Args tell of ({', '.join(told)})"
    is_property = any(dotted_name(entry).endswith("property") for entry in node.decorator_list)
    is_silent = node.returns is None or ast.unparse(node.returns) in NOTHING
    if not (is_property or is_silent or {"Returns", "Yields"} & sections.keys()):
        yield "has neither Returns nor Yields"


def rule_docstrings(tree: Tree) -> Iterator[str]:
    """Each module and public class says what it is for, and each public function all of it."""
    nodes = [node for module in tree.values() for node in ast.walk(module.body)]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}

    def is_told_by_base(owner: ast.Module | ast.ClassDef, name: str) -> bool:
        bases = owner.bases if isinstance(owner, ast.ClassDef) else []
        found = [classes.get(dotted_name(base).rpartition(".")[2]) for base in bases]
        return any(
            any(
                isinstance(node, ast.FunctionDef) and node.name == name and ast.get_docstring(node)
                for node in base.body
            )
            or is_told_by_base(base, name)
            for base in found
            # One that is called like its base, of another package.
            if base is not None and base is not owner
        )

    def visit(owner: ast.Module | ast.ClassDef, path: str) -> Iterator[str]:
        for node in owner.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            # A setter or an overload is explained where its name first stands.
            is_repeat = any(
                dotted_name(decorator).rpartition(".")[2] in {"overload", "setter"}
                for decorator in node.decorator_list
            )
            if node.name.startswith("_") or is_repeat:
                continue
            doc = ast.get_docstring(node)
            if doc is None and not is_told_by_base(owner, node.name):
                yield f"{path}:{node.lineno}: {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from visit(node, path)
            elif doc is not None:
                for fault in docstring_faults(node, doc):
                    yield f"{path}:{node.lineno}: {node.name} {fault}"

    for module in filter(lambda module: module.is_shipped, tree.values()):
        if ast.get_docstring(module.body) is None:
            yield f"{module.path}:1: the module has no docstring"
        yield from visit(module.body, module.path)


RULES: Sequence[Rule] = (
    rule_import_direction,
    rule_libraries,
    rule_safe_load,
    rule_no_exit,
    rule_docstrings,
)


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Write source files under ``root``, with the package files that they need."""
    for path, source in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
        for parent in list(Path(path).parents)[:-1]:
            package_file = root / parent / "__init__.py"
            if not package_file.exists():
                package_file.write_text('"""Package."""\n', encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps(rule: Rule) -> None:
    tree = read_tree(ROOT)
    assert {module.partition(".")[0] for module in tree} >= {*PACKAGES, "tests"}
    found = list(rule(tree))
    assert not found, "\n".join(found)


# The value is put in so that the words a search looks for stand nowhere in this file.
UNSAFE = False
VIOLATIONS: Sequence[tuple[Rule, str, str, int]] = [
    (rule_import_direction, "ecoformer/ops/a.py", "import ecoformer.hashing", 1),
    (rule_import_direction, "ecoformer/ops/a.py", "from ecoformer import HashConfig", 1),
    (rule_import_direction, "ecoformer/ops/a.py", "from ..hashing import fit", 1),
    (rule_import_direction, "ecoformer/hashing/a.py", "from ecoformer import attention", 1),
    (rule_import_direction, "ecoformer/layers.py", "import ecoformer.config", 1),
    (rule_import_direction, "ecoformer/checkpoint/a.py", "from ecoformer.config import Config", 1),
    (rule_import_direction, "ecoformer/data/a.py", "import ecoformer.engine.train", 1),
    (rule_import_direction, "ecoformer/engine/a.py", "def f():\n    import pvt", 2),
    (rule_import_direction, "ecoformer/engine/a.py", "import ecoformer.tools.benchmark", 1),
    (rule_import_direction, "ecoformer/cost/a.py", "import_module('pvt')", 1),
    (rule_import_direction, "ecoformer/demo.py", "import pvt", 1),
    (rule_import_direction, "ecoformer/unplaced.py", "", 0),
    (rule_import_direction, "pvt/model.py", "from twins import variants", 1),
    (rule_import_direction, "pvt/model.py", "from ecoformer.engine.main import run_main", 1),
    (rule_import_direction, "twins/main.py", "def f():\n    from pvt import FAMILY", 2),
    (rule_libraries, "ecoformer/ops/a.py", "import numpy as np", 1),
    (rule_libraries, "ecoformer/hashing/a.py", "def f():\n    import timm", 2),
    (rule_libraries, "ecoformer/engine/a.py", "from matplotlib import pyplot", 1),
    (rule_libraries, "ecoformer/engine/a.py", "from torch.utils import tensorboard", 1),
    (rule_safe_load, "ecoformer/a.py", f"import torch\ntorch.load('x', weights_only={UNSAFE})", 2),
    (rule_safe_load, "tests/a.py", f"read('x', weights_only={UNSAFE})", 1),
    (rule_safe_load, "ecoformer/a.py", "import torch\ntorch.load('x')", 2),
    (rule_no_exit, "ecoformer/a.py", "import sys\ndef f():\n    sys.exit(1)", 3),
    (rule_no_exit, "pvt/main.py", "def main():\n    raise SystemExit(2)", 2),
    (rule_docstrings, "twins/a.py", "", 1),
    (rule_docstrings, "twins/a.py", "'''Doc.'''\ndef f(): pass", 2),
    (rule_docstrings, "twins/a.py", "'''Doc.'''\nclass _A: pass\nclass B: pass", 3),
    (rule_docstrings, "twins/a.py", "'''Doc.'''\nclass A:\n  '''Doc.'''\n  def f(self): pass", 4),
    (rule_docstrings, "twins/a.py", "'D.'\nclass A(nn.Module):\n 'D.'\n def f(self): 1", 4),
    (rule_docstrings, "twins/a.py", "'''Doc.'''\ndef f(x): '''Doc.'''", 2),
    (rule_docstrings, "twins/a.py", "'''Doc.'''\ndef f(*, x): '''Doc.\nArgs:\n    y: 1.'''", 2),
    (rule_docstrings, "twins/a.py", "'''Doc.'''\ndef f(): '''Doc.\nArgs:\n    x: 1.'''", 2),
    (rule_docstrings, "twins/a.py", "'''Doc.'''\ndef f(x): '''Doc.\nSource:\n    x: 1.'''", 2),
    (rule_docstrings, "twins/a.py", "'''Doc.'''\ndef f() -> int | None: '''Doc.'''", 2),
    (rule_docstrings, "twins/a.py", "'''Doc.'''\ndef f() -> Iterator[int]: '''Returns: 1.'''", 2),
    (rule_docstrings, "twins/a.py", "'D.'\nclass A:\n 'D.'\n def f(self) -> int: 'D.'", 4),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "path", "source", "line"), VIOLATIONS)
def test_rule_finds_violation(
    rule: Rule, path: str, source: str, line: int, tmp_path: Path
) -> None:
    # The packages that the violations name.
    packages = {f"{name}/__init__.py": '"""P."""' for name in PACKAGES}
    packages |= {
        f"ecoformer/{name}/__init__.py": '"""P."""'
        for name in ("attention", "config", "engine", "hashing", "ops")
    }
    packages["twins/variants.py"] = '"""V."""'
    tree = read_tree(write_tree(tmp_path, packages | {path: source}))
    found = list(rule(tree))
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_rules_pass_what_comes_close(tmp_path: Path) -> None:
    files = {
        "ecoformer/ops/codes.py": (
            '"""Ops."""\nimport math\nimport torch\nfrom ecoformer.errors import InputError\n'
            "from . import reference\n"
        ),
        "ecoformer/ops/reference.py": '"""Truth, next to weights_only."""\n',
        "ecoformer/errors.py": '"""Errors."""\n\n\ndef _private(): pass\n',
        "ecoformer/demo.py": '"""Demo."""\ndef main():\n    """Run."""\n    import pvt, sklearn\n',
        "ecoformer/engine/main.py": (
            '"""Engine."""\nimport timm\nimport torch\nfrom ecoformer import __version__\n'
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from torch.utils.tensorboard import SummaryWriter\n"
            "torch.load('x', weights_only=True)\n"
        ),
        "pvt/main.py": (
            '"""Command."""\nfrom ecoformer.engine.main import run_main\nfrom pvt import FAMILY\n'
            "if __name__ == '__main__':\n    raise SystemExit(run_main(FAMILY))\n"
        ),
        "twins/model.py": (
            '"""Model."""\n\n\nclass A:\n    """Doc."""\n    @property\n    def x(self):\n'
            '        """Doc."""\n    @x.setter\n    def x(self, value): pass\n'
            '    def f(self):\n        """Doc."""\n\n\nclass B(A):\n    """Doc."""\n\n\n'
            'class C(B):\n    """Doc."""\n    def f(self): pass\n'
        ),
        "twins/told.py": (
            '"""Told."""\n\n\nclass A:\n    """Doc."""\n    @property\n    def x(self) -> int:\n'
            '        """Number."""\n    def f(self, a, *b, c=1, **d) -> int:\n        """Add.\n\n'
            "        Args:\n            a: one,\n                two.\n            b: 1.\n"
            "            c: 1.\n            d: 1.\n\n        Returns:\n            1: the sum.\n\n"
            '        Source: here.\n        """\n\n\ndef g() -> None:\n    """Do."""\n\n\n'
            '@contextmanager\ndef h() -> Iterator[None]:\n    """Hold."""\n\n\n'
            'def i() -> Iterator[int]:\n    """Count.\n\n    Yields:\n        1.\n    """\n\n\n'
            '@triton.jit\ndef j(x):\n    """Load."""\n\n\ndef _private(x) -> int: return x\n'
        ),
    }
    tree = read_tree(write_tree(tmp_path, files))
    assert [line for rule in RULES for line in rule(tree)] == []


def probe_imports(tree: Path) -> list[str]:
    """Import all modules under ``tree`` in a fresh process and return what was impure."""
    probe = Path(__file__).with_name("import_probe.py")
    result = subprocess.run(
        [sys.executable, str(probe), str(tree)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    findings = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(findings, list)
    return findings


def test_importing_is_pure() -> None:
    findings = probe_imports(ROOT)
    assert not findings, "\n".join(findings)


def test_import_probe_finds_violations(tmp_path: Path) -> None:
    files = {
        "ecoformer/__init__.py": "import colorsys\nimport other\n",
        "other.py": "",
        "ecoformer/arguments.py": "import argparse\nargparse.ArgumentParser().parse_args()\n",
        "ecoformer/device.py": "import torch\nHAS_CUDA = torch.cuda.is_available()\n",
        "ecoformer/reading.py": (
            "from pathlib import Path\nTEXT = Path(__file__).with_name('data.txt').read_text()\n"
        ),
        "ecoformer/data.txt": "data",
        "pvt/writing.py": f"import os\nos.mkdir({str(tmp_path / 'made')!r})\n",
        "twins/process.py": "import subprocess, sys\nsubprocess.run([sys.executable, '-V'])\n",
        "twins/calm.py": (
            "import sys, warnings\nimport tensorboard\nwarnings.warn('reads this line')\n\n\n"
            "def main():\n    return open(sys.argv[1])\n"
        ),
    }
    findings = probe_imports(write_tree(tmp_path, files))
    expected = (
        "ecoformer: import also imports other",
        "ecoformer/arguments.py:2: sys.argv read",
        "ecoformer.arguments: import raised SystemExit",
        "ecoformer/device.py:2: torch.cuda.is_available called",
        "ecoformer/reading.py:2: open",
        "pvt/writing.py:2: os.mkdir",
        "twins/process.py:2: subprocess.Popen",
    )
    for start in expected:
        assert any(finding.startswith(start) for finding in findings), (start, findings)
    assert not any("calm" in finding for finding in findings), findings
