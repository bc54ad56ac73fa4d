"""Every recipe of .github/CONTRIBUTING.md runs as it stands."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecoformer.data.digits import load_digits

FILE = Path(__file__).parents[1] / ".github" / "CONTRIBUTING.md"
TEXT = FILE.read_text("utf-8")
RECIPES = dict(re.findall(r"^## (Add .*?)$(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
# What recipes add to.
REGISTRIES = [
    ("ecoformer.attention.registry", "_KINDS"),
    ("ecoformer.models.registry", "FAMILIES"),
    ("ecoformer.ops.backends", "BACKENDS"),
    ("ecoformer.tasks", "TASKS"),
]


@pytest.fixture(autouse=True)
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program in a folder of its own, which ends with the test; it has few of the digits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module, name in REGISTRIES:
        owner = importlib.import_module(module)
        monkeypatch.setattr(owner, name, getattr(owner, name).copy())
    monkeypatch.setattr(
        "ecoformer.data.datasets.load_digits",
        lambda split, *, size: tuple(part[:64] for part in load_digits(split, size=size)),
    )
    yield
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs(recipe: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", RECIPES[recipe], re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        if named := re.match(r"# (\w+\.py)\n", block):
            Path(named[1]).write_text(block)
        else:
            exec(compile(block, recipe, "exec"), {})


def test_it_tells_of_each_seam_and_names_what_is_there() -> None:
    assert len(RECIPES) == 5
    root = FILE.parents[1]
    paths = re.findall(r"`((?:ecoformer|tests|\.github|\.ci)/[\w/.]+)`", TEXT)
    paths += re.findall(r"^pytest .*?(tests/\w+)", TEXT, re.MULTILINE)
    paths += [f".github/{link}" for link in re.findall(r"\]\(([^)]+)\)", TEXT)]
    assert not [path for path in paths if not (root / path).exists()]
