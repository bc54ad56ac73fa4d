"""Runs inside other commands: what they say is what a user can type, and how they end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ecoformer.config import Config, make_config, parse_config
from ecoformer.errors import Preempted
from ecoformer.tools import demo, runs
from ecoformer.tools.runs import spell_flags
from ecoformer.tools.tables import command, recipe
from ecoformer.tools.tables.recipe import Recipe


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What would be trained and evaluated, in order."""
    configs: list[Config] = []

    def note(config: Config) -> SimpleNamespace:
        configs.append(config)
        return SimpleNamespace(log=[{"test_acc1": 1.0}])

    monkeypatch.setattr(runs, "train", note)
    monkeypatch.setattr(runs, "evaluate", note)
    return configs


def read_commands(text: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ ")]


def check_commands(text: str, configs: list[Config]) -> None:
    """Each line that was said means the configuration that was run."""
    commands = read_commands(text)
    assert len(commands) == len(configs)
    for (door, name, *words), config in zip(commands, configs, strict=True):
        assert (door, name in ("train", "eval")) == ("ecoformer", True)
        assert parse_config(words) == config


def test_the_demo_says_what_it_does(
    calls: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo._train("pvt_v2_b0", tmp_path)
    check_commands(capsys.readouterr().out, calls)
    first, _, second, last = calls
    stage1, stage2 = (str(tmp_path / kind / "last_checkpoint.pth") for kind in ("msa", "ecoformer"))
    assert (first.run.finetune, second.run.finetune) == (None, stage1)
    assert (first.model.attn_type, second.model.attn_type) == ("msa", "ecoformer")
    # It starts anew, and is measured after the last epoch.
    assert (second.run.resume, last.run.resume) == (None, stage2)


def test_a_recipe_says_what_it_does(
    calls: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = Recipe("pvt_v2_b0", "DIGITS", None, 32, (2, 1), 8, torch.device("cpu"), tmp_path)
    assert len(shared.train("ecoformer", 3, {"num_bits": 8})) == 2
    check_commands(capsys.readouterr().out, calls)
    first, second = calls
    assert (first.optim.epochs, second.optim.epochs) == (2, 1)
    assert first.optim.lr == 4 * second.optim.lr
    assert (second.hashing.num_bits, second.run.seed) == (8, 3)
    assert second.run.finetune == str(tmp_path / "seed3" / "msa_stage1" / "last_checkpoint.pth")
    assert second.augment.aa is None and not second.data.repeated_aug


@pytest.mark.parametrize(
    "values", [{"aa": None}, {"scale": (0.5, 1.0)}, {"pin_mem": False}, {"compile": True}]
)
def test_fields_are_spelled_as_flags(values: Mapping[str, object]) -> None:
    values = {"model": "pvt_v2_b0", **values}
    assert parse_config(spell_flags(values)) == make_config(**values)


def test_without_a_clone_the_demo_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_CONFIGS", tmp_path / "configs")
    assert demo.main(["--output-dir", str(tmp_path)]) == 2
    assert "run the demo from a clone" in capsys.readouterr().err


def test_a_preempted_run_ends_the_table_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(values: Mapping[str, object]) -> None:
        raise Preempted("stopped by SIGTERM, saved; the same command goes on.")

    monkeypatch.setattr(recipe, "run_training", stop)
    assert command.main(["bits", "--output-dir", str(tmp_path), "--device", "cpu"]) == 75
    assert capsys.readouterr().err.startswith("error: stopped by SIGTERM")
