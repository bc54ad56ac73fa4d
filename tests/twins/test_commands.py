"""Twins on the shared stack: a step on two ranks, and the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ecoformer import HashConfig
from ecoformer.engine.launch import process_group
from ecoformer.ranks import rank
from tests.engine.ranks import run_ranks
from tests.engine.training import make_batches, start, train
from tests.twins.tiny import TINY_PCPVT, TINY_SVT
from twins import FAMILY
from twins.get_energy import main as get_energy
from twins.main import main
from twins.model import Twins


def _take_a_step() -> dict[str, Tensor]:
    with process_group("cpu"):
        torch.manual_seed(0)
        hashing = HashConfig(num_bits=4, num_anchors=8, num_fit_steps=2)
        model = Twins(TINY_SVT, "ecoformer", num_classes=2, hashing=hashing, drop_path_rate=0.2)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train(*start(model, **FAMILY.recipe), make_batches(1, 8, seed=rank()))
        after = model.state_dict()
        assert all(not torch.equal(before[name], after[name]) for name in before)
        return dict(after)


def test_a_step_on_two_ranks() -> None:
    first, second = run_ranks(_take_a_step, 2)
    assert any("hash.weight" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_command_times_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = "--model alt_gvt_small_ecoformer --throughput --batch-size 1 --input-size 32"
    assert main([*flags.split(), "--device", "cpu", "--output_dir", str(tmp_path)]) == 0
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model alt_gvt_smal", "did you mean 'alt_gvt_small'"),
        ("--model alt_gvt_small --attn_type sra", "has: ecoformer, msa, lsa_msa, lsa_gsa"),
        ("--model alt_gvt_small_ecoformer --train_msa", "--train_msa"),
        ("--model alt_gvt_small --data-path nowhere", "nowhere"),
        ("--windowsize 7", "unknown flag --windowsize"),
        ("--model alt_gvt_small_ecoformer --data-set DIGITS --eval", "--eval needs weights"),
        ("--model alt_gvt_small --data-set DIGITS --eval --resume pcpvt.pth", "another model"),
        ("--model alt_gvt_small --data-set DIGITS --finetune pcpvt.pth", "another model"),
        ("--model alt_gvt_small_ecoformer --data-set DIGITS --batch-size 2", "blocks.2.0.attn"),
    ],
)
def test_bad_input_is_one_line(
    flags: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Twins(TINY_PCPVT, "sra").state_dict(), "pcpvt.pth")
    small = "--device cpu --input-size 32 --num-workers 0"
    assert main([*flags.split(), *small.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_energy_of_a_released_name(capsys: pytest.CaptureFixture[str], golden_dir: Path) -> None:
    assert get_energy(["--model", "alt_gvt_small_ecoformer", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    golden = json.loads((golden_dir / "cost.json").read_text())["alt_gvt_small/ecoformer"]
    assert {name: cost[name] for name in ("mul", "add")} == {
        name: golden[name] for name in ("mul", "add")
    }
