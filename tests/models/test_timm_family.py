"""timm's names on the trainer: both stages, what they leave, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ecoformer import InputError, load_checkpoint
from ecoformer.config import Config, make_config
from ecoformer.engine.command import run_command
from ecoformer.engine.logs import read_log
from ecoformer.engine.run import load_run, time_model, train
from ecoformer.errors import Preempted
from ecoformer.hashing import hash_layers
from ecoformer.models.registry import find_family
from ecoformer.models.timm_family import FAMILY
from ecoformer.tools.energy.command import run_get_energy
from ecoformer.tools.tables.ablations import list_arms
from ecoformer.tools.tables.costs import describe_cost
from tests.engine.training import assert_same_state
from tests.tasks.toy import stop_at
from tests.tiny import TINY_HASH

VIT = "vit_tiny_patch16_224"
# Four patches and a class token.
KEYWORDS: dict[str, Any] = {"depth": 2, "embed_dim": 24}
FLAGS = [
    *("--model", VIT, "--model-kwargs", "depth=2", "embed_dim=24", "--input-size", "32"),
    *("--data-set", "DIGITS", "--device", "cpu", "--num-workers", "0", "--no-repeated-aug"),
    *("--batch-size", "720", "--epochs", "1", "--warmup-epochs", "0", "--num-fit-steps", "2"),
]


def build(attention: str, num_classes: int = 10, **keywords: Any) -> nn.Module:
    keywords = {"input_size": 32, **KEYWORDS, **keywords}
    return FAMILY.create_model(
        VIT, attention, num_classes=num_classes, hashing=TINY_HASH, **keywords
    )


def test_softmax_is_timms_model_as_it_is() -> None:
    torch.manual_seed(0)
    ours = build("msa").state_dict()
    torch.manual_seed(0)
    theirs = timm.create_model(VIT, num_classes=10, img_size=32, **KEYWORDS).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("num_classes", [10, 3])
def test_weights_of_timm_become_those_of_the_converted_model(num_classes: int) -> None:
    source = timm.create_model(VIT, num_classes=num_classes, img_size=32, **KEYWORDS).state_dict()
    model = build("ecoformer")
    report = load_checkpoint(model, source)
    state = model.state_dict()
    for block in ("blocks.0.attn.", "blocks.1.attn."):
        for leaf in ("weight", "bias"):
            query, _, value = source[f"{block}qkv.{leaf}"].chunk(3)
            assert torch.equal(state[f"{block}to_qk.{leaf}"], query)
            assert torch.equal(state[f"{block}to_v.{leaf}"], value)
    fresh = () if num_classes == 10 else ("head.weight", "head.bias")
    assert report.missing == fresh
    assert not report.unused
    same = [name for name in source if name in state and name not in fresh]
    assert len(same) == len(source) - 4 - len(fresh)
    assert all(torch.equal(state[name], source[name]) for name in same)


def test_positions_follow_the_size_of_the_images() -> None:
    source = timm.create_model(VIT, num_classes=10, img_size=64, **KEYWORDS).state_dict()
    model = build("ecoformer")
    report = load_checkpoint(model, source)
    assert "Positions are resampled from 4 x 4 to 2 x 2 patches" in str(report)
    ours, theirs = model.get_parameter("pos_embed"), source["pos_embed"]
    assert torch.equal(ours[:, 0], theirs[:, 0])
    assert ours[:, 1:].mean().item() == pytest.approx(theirs[:, 1:].mean().item(), abs=1e-2)
    with pytest.raises(InputError, match="pos_embed"):
        load_checkpoint(build("msa"), source, strict=True)


def test_a_classifier_of_another_name_may_be_fresh() -> None:
    name, keywords = "deit_tiny_distilled_patch16_224", {"input_size": 32, **KEYWORDS}
    source = FAMILY.create_model(name, "msa", num_classes=3, **keywords).state_dict()
    model = FAMILY.create_model(name, "ecoformer", num_classes=10, **keywords)
    report = load_checkpoint(model, source)
    heads = {f"{head}.{leaf}" for head in ("head", "head_dist") for leaf in ("weight", "bias")}
    assert set(report.missing) == heads


@pytest.mark.parametrize("attention", ["msa", "ecoformer"])
def test_a_model_without_data_has_the_same_entries(attention: str) -> None:
    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in model.state_dict().items()}

    keywords = {"input_size": 32, "num_classes": 10, "hashing": TINY_HASH, **KEYWORDS}
    empty = FAMILY.create_empty(VIT, attention, **keywords)
    assert all(value.is_meta for value in empty.state_dict().values())
    assert shapes(empty) == shapes(build(attention))


def test_both_stages_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command([*FLAGS, "--attn_type", "msa"]) == 0
    stage1 = f"runs/{VIT}/last_checkpoint.pth"
    second = [*FLAGS, "--attn_type", "ecoformer", "--finetune", stage1]
    second += ["--distill", "output", "--teacher", stage1]
    assert run_command(second) == 0
    said = capsys.readouterr().out
    assert "derived (attn.to_qk, attn.to_v)" in said
    assert "fitted the hash functions of 2 layers" in said
    assert "compared in the outputs of 2 layers" in said
    folder = tmp_path / "runs" / f"{VIT}_ecoformer"
    [record] = read_log(folder)

    # The same command goes on; weights alone serve evaluation.
    assert run_command(second) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    weights = ["--resume", str(folder / "best_checkpoint.pth"), "--eval"]
    assert run_command([*FLAGS, "--attn_type", "ecoformer", *weights]) == 0
    assert f"top-1 {record['test_acc1']:.2f} %" in capsys.readouterr().out
    assert len(hash_layers(load_run(folder).model)) == 2


def configure(folder: Path, **fields: object) -> Config:
    return make_config(
        **{
            **{"model": VIT, "model_kwargs": ["depth=2", "embed_dim=24"], "data_set": "DIGITS"},
            **{"attn_type": "ecoformer", "input_size": 32, "device": "cpu", "num_workers": 0},
            **{"batch_size": 360, "epochs": 1, "warmup_epochs": 0, "num_fit_steps": 2},
            **{"repeated_aug": False, "output_dir": folder, **fields},
        }
    )


def test_it_goes_on_exactly_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configure(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_at(1, patch)
        with pytest.raises(Preempted, match="saved at epoch 0, step 2"):
            train(configure(tmp_path / "stopped"))
    train(configure(tmp_path / "stopped"))
    for name in ("last_checkpoint.pth", "best_checkpoint.pth"):
        assert_same_state(tmp_path / "whole" / name, tmp_path / "stopped" / name)


def test_its_cost_and_speed_need_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for attention in ("msa", "ecoformer"):
        assert run_get_energy(["--model", VIT, "--attn_type", attention]) == 0
        assert f"| {attention} attention" in capsys.readouterr().out
    throughput = time_model(configure(tmp_path, batch_size=1))
    assert throughput.median > 0


def test_tables_take_it() -> None:
    arms = list_arms("kinds", VIT)
    assert [arm.name for arm in arms] == ["softmax", "EcoFormer", "EcoFormer, normalized bias"]
    softmax, hashed = (describe_cost(VIT, name, input_size=64) for name in ("msa", "ecoformer"))
    assert softmax["parameters"] - hashed["parameters"] == 12 * (192**2 + 192)  # type: ignore[operator]
    assert softmax["executed"] != hashed["executed"]


def test_a_name_is_timms_where_no_family_of_ours_has_it() -> None:
    assert find_family("pvt_v2_b0").name == "pvt"
    assert find_family("deit_tiny_patch16_224").name == "timm"
    assert FAMILY.resolve("deit_tiny_patch16_224") == ("deit_tiny_patch16_224", "msa")
    with pytest.raises(InputError, match=r"did you mean 'deit_tiny_patch16_224'\?") as caught:
        find_family("deit_tiny_patch16_22")
    # Thousands of names are no line.
    assert len(str(caught.value)) < 1000
    with pytest.raises(InputError, match=r"has no attention kind 'sra'; it has: msa, ecoformer"):
        FAMILY.resolve("deit_tiny_patch16_224", "sra")


def test_help_and_wrong_flags_wait_for_no_import() -> None:
    code = (
        "import sys\n"
        "from ecoformer.engine.command import run_command\n"
        "code = run_command(['--model', 'pvt_v2_b0', '--attn_type', 'softmax'])\n"
        "print(code, sorted({'torch', 'timm'} & sys.modules.keys()))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "2 []\n", ended.stdout + ended.stderr


def test_images_are_of_the_size_that_was_asked_for() -> None:
    images = torch.randn(1, 3, 48, 48)
    logits: Tensor = build("msa", input_size=48).eval()(images)
    assert logits.shape == (1, 10)
    # These have no img_size, and take any; the second says so in words of its own.
    for name in ("resnet10t", "poolformer_s12"):
        logits = FAMILY.create_model(name, "msa", input_size=48, num_classes=10).eval()(images)
        assert logits.shape == (1, 10)
    # The side of its patches is a number, not two.
    assert FAMILY.create_empty("xcit_nano_12_p16_224", "msa", input_size=48).patch_embed


@pytest.mark.parametrize(
    ("name", "attention", "keywords", "words"),
    [
        (VIT, "msa", {"input_size": 40}, "have 16 pixels a side, .* give 32 or 48"),
        (VIT, "msa", {"depht": 2}, "unexpected keyword argument 'depht'"),
        (VIT, "msa", {"embed_dim": 25}, f"timm cannot build {VIT}"),
        ("vgg11", "msa", {"drop_path_rate": 0.1}, "no drop_path_rate; give --drop-path 0"),
        ("resnet10t", "ecoformer", {}, "ResNet has no softmax self-attention"),
    ],
)
def test_models_that_cannot_be(
    name: str, attention: str, keywords: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        FAMILY.create_empty(name, attention, **keywords)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("depth", "expected key=value"),
        ("2=depth", "expected key=value"),
        ("img_size=32", "sets img_size, which --input-size does"),
        ("pretrained=True", "sets pretrained, which --finetune does"),
    ],
)
def test_keywords_that_cannot_be(word: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Config.from_flat({"model_kwargs": [word]})
