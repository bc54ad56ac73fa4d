"""Every file under configs/: it loads, it is what its name says, and its command works."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from ecoformer.config import Config, parse_config
from ecoformer.models.registry import ModelFamily
from tests.engine.training import evaluate, make_batches, start_as_configured, train

ROOT = Path(__file__).parents[2]
FAMILY_OF_FOLDER = {"pvt_v2": "pvt", "twins": "twins"}
FILES = [
    path.relative_to(ROOT)
    for folder in FAMILY_OF_FOLDER
    for path in sorted((ROOT / "configs" / folder).glob("*.py"))
]
COMMAND = re.compile(r"torchrun --nproc_per_node=8 -m (\w+)\.main (.*)", re.DOTALL)


def parse_own_command(
    path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Config:
    """Run the command of a file's docstring up to the configuration."""
    monkeypatch.chdir(ROOT)
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc
    command = COMMAND.search(doc)
    assert command
    assert command[1] == FAMILY_OF_FOLDER[path.parent.name]
    family: ModelFamily = request.getfixturevalue(command[1])
    return parse_config(shlex.split(command[2].replace("\\\n", " ")), family)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_is_what_it_says(
    path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_own_command(path, request, monkeypatch)
    assert config.run.config == str(path)
    assert path.stem == f"{config.model.model}_{config.model.attn_type}"
    assert config.run.output_dir == f"runs/{path.stem}"
    if config.run.finetune and config.run.finetune.startswith("runs/"):
        stage1 = Path(config.run.finetune).parent.name
        assert (path.parent / f"{stage1}.py").is_file()
        assert stage1 == f"{config.model.model}_msa"
    stage = {"ecoformer": 30, "msa": 100, "lsa_msa": 100, "sra": 300, "lsa_gsa": 300}
    assert config.optim.epochs == stage.get(config.model.attn_type or "", 30)
    assert bool(config.run.finetune) == (config.optim.epochs < 300)


def test_no_size_is_missing() -> None:
    names = {path.stem for path in FILES}
    for variant in (f"pvt_v2_b{size}" for size in range(6)):
        assert {f"{variant}_msa", f"{variant}_ecoformer"} <= names
    for size in ("small", "base", "large"):
        assert {f"alt_gvt_{size}_msa", f"alt_gvt_{size}_ecoformer"} <= names
        assert {f"pcpvt_{size}_v0_{kind}" for kind in ("sra", "msa", "ecoformer")} <= names


def test_expected_results_are_the_published_ones(golden_dir: Path) -> None:
    published = json.loads((golden_dir / "published_table.json").read_text(encoding="utf-8"))
    claimed = {}
    for path in FILES:
        if match := re.search(r"([\d.]+) % top-1 .* for EcoFormer", path.read_text("utf-8")):
            claimed[path.stem] = float(match[1])
    assert claimed == {f"{name}_ecoformer": row["top1"] for name, row in published.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_trains_and_evaluates(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    family = importlib.import_module(FAMILY_OF_FOLDER[path.parent.name]).FAMILY
    small = ["--input-size", "32", "--num-fit-steps", "1"]
    config = parse_config(["--config", str(path), *small], family)
    model = family.create_model(
        config.model.model,
        config.model.attn_type,
        num_classes=2,
        hashing=config.hashing,
        drop_path_rate=config.model.drop_path,
    )
    state = start_as_configured(model, config)
    before = model.state_dict()["head.bias"].clone()
    # 4 tokens an image in stage 3: 7 images hold the 25 anchors.
    batches = make_batches(1, 7)
    train(state, config, batches)
    assert not torch.equal(before, model.state_dict()["head.bias"])
    result = evaluate(model, batches)
    assert result.num_images == 7
