"""Sequences are a task like any other: padding counts nowhere, and a stopped run goes on."""

from __future__ import annotations

import ast
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import ecoformer
from ecoformer.__main__ import main
from ecoformer.config import Config, make_config, parse_config
from ecoformer.data.sequences import open_sequences, pad_sequences
from ecoformer.engine.run import evaluate, load_run, time_model, train
from ecoformer.engine.session import create_task
from ecoformer.errors import InputError, Preempted
from ecoformer.models.encoder import create_model
from tests.engine.ranks import run_ranks
from tests.engine.training import assert_same_state
from tests.tasks.toy import stop_at

ROOT = Path(__file__).parents[2]
KINDS = ("ecoformer", "msa", "msa_share_qk", "performer")
TOY_SIZES = {"num_classes": 10, "num_words": 15, "max_tokens": 48}


def configure(folder: Path, **fields: object) -> Config:
    """Two epochs of three steps on digits as 64 pixels, on the CPU."""
    return make_config(
        **{
            **{"task": "sequence", "data_set": "PIXELS", "max_tokens": 64, "device": "cpu"},
            **{"output_dir": folder, "epochs": 2, "epoch_samples": 48, "batch_size": 16},
            **{"warmup_epochs": 0, "num_workers": 0, "num_fit_steps": 2, "refit_every_epochs": 1},
            **fields,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_padding_counts_nowhere(kind: str) -> None:
    torch.manual_seed(0)
    model = create_model("encoder", kind, **TOY_SIZES).eval()
    samples = [open_sequences("LISTOPS", None, "val", max_tokens=48).read(i) for i in range(6)]
    tokens, key_mask, labels = pad_sequences(samples)
    assert key_mask is not None and labels.tolist() == [label for _, label in samples]
    if kind == "ecoformer":
        ecoformer.fit_hash_functions(model, (tokens, key_mask))
    together = model(tokens, key_mask)
    # The largest key of the batch is a part of Performer's rounding.
    for logits, (sequence, _) in zip(together, samples, strict=True):
        alone = model(torch.from_numpy(sequence)[None])[0]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    noise = torch.where(key_mask, tokens, torch.randint(15, tokens.shape))
    torch.testing.assert_close(model(noise, key_mask), together)


def test_sequences_of_one_length_need_no_mask() -> None:
    tokens, key_mask, _ = pad_sequences([(np.arange(5), 0), (np.arange(5), 1)])
    assert tokens.tolist() == [[0, 1, 2, 3, 4]] * 2 and key_mask is None


def test_it_is_trained_evaluated_opened_and_timed(tmp_path: Path) -> None:
    config = configure(tmp_path, epochs=1)
    assert (config.model.model, config.model.attn_type) == ("encoder", "ecoformer")
    last = train(config).log[-1]
    metrics = evaluate(config)
    assert metrics.values == {name: last[name] for name in metrics.values}
    model = load_run(tmp_path).model
    tokens = torch.from_numpy(open_sequences("PIXELS", None, "val", max_tokens=64).read(3)[0])
    assert model(tokens[None]).shape == (1, 10)
    assert "sequences/s" in str(time_model(config))


def test_the_test_split_is_measured_once_a_run_is_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ecoformer")
    fields = {"data_set": "LISTOPS", "max_tokens": 24, "epochs": 1, "eval_samples": 200}
    train(configure(tmp_path, **fields))
    config = configure(tmp_path, **fields, eval=True, eval_split="test")
    seen = create_task(config).open_data(torch.device("cpu"), is_train=False)
    tokens, key_mask, _ = next(iter(seen.eval))
    split = open_sequences("LISTOPS", None, "test", max_tokens=24)
    held_out = [split.read(index)[0].tolist() for index in range(len(split))]
    assert all(one[mask].tolist() in held_out for one, mask in zip(tokens, key_mask, strict=True))
    assert evaluate(config).values != evaluate(configure(tmp_path, **fields)).values
    assert "measuring the test split of LISTOPS" in caplog.text
    with pytest.raises(InputError, match="--eval-split test is for --eval"):
        train(config)


def test_it_learns_digits_from_their_pixels(tmp_path: Path) -> None:
    config = configure(tmp_path, attn_type="msa", epochs=3, epoch_samples=None, lr=0.1, drop=0.0)
    assert train(config).log[-1]["test_acc1"] > 20


@pytest.mark.parametrize("data_set", ["PIXELS", "LISTOPS"])
def test_it_goes_on_exactly_where_it_was_stopped(
    data_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"data_set": data_set, "max_tokens": 64 if data_set == "PIXELS" else 24}
    whole, stopped = (configure(tmp_path / name, **fields) for name in ("whole", "stopped"))
    train(whole)
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Preempted):
            train(stopped)
    train(stopped)
    assert_same_state(
        tmp_path / "stopped" / "last_checkpoint.pth", tmp_path / "whole" / "last_checkpoint.pth"
    )


def _train_pair(folder: Path, update: int | None) -> str:
    if update is not None and os.environ["RANK"] == "1":
        stop_at(update, pytest.MonkeyPatch())
    try:
        train(configure(folder, batch_size=8))
    except Preempted as stop:
        return str(stop.exit_code)
    return "done"


def test_two_ranks_stop_and_go_on_together(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_ranks(_train_pair, 2, whole, None) == ["done", "done"]
    assert run_ranks(_train_pair, 2, stopped, 4) == ["75", "75"]
    assert run_ranks(_train_pair, 2, stopped, None) == ["done", "done"]
    assert_same_state(stopped / "last_checkpoint.pth", whole / "last_checkpoint.pth")


@pytest.mark.parametrize("name", ["listops", "pathfinder"])
def test_a_full_protocol_has_50000_steps(name: str) -> None:
    path = ROOT / "configs" / "sequence" / f"{name}.py"
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc is not None
    command = doc[doc.index("ecoformer train") :].replace("\\\n", " ").split()
    config = parse_config([*command[2:], "--config", str(path)])
    steps_an_epoch = (config.data.epoch_samples or 0) // config.data.batch_size
    assert steps_an_epoch * config.optim.epochs == 50000
    task = create_task(config)
    data = task.open_data(torch.device("cpu"), is_train=True)
    assert data.train is not None and len(data.train) == steps_an_epoch


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data_set": "DIGITS"}, "--data-set DIGITS has no sequences"),
        ({"eval_split": "test"}, "PIXELS has no third split, as LISTOPS and PATHFINDER have"),
        ({"max_tokens": 63}, "has 64 tokens, and the model positions for 63"),
        ({"mixup": 0.8}, "mixup 0.8 is for images"),
        ({"cutmix_minmax": (0.2, 0.8)}, "cutmix_minmax .* is for images"),
        ({"input_size": 448}, "input_size 448 is no size of --task sequence, which has max_tokens"),
        ({"model": "pvt_v2_b0"}, "pvt_v2_b0 takes images, and --task sequence gives tokens"),
        ({"attn_type": "sra"}, "encoder has no attention kind 'sra'"),
        ({"data_path": "no/such/folder"}, "no/such/folder is no folder"),
    ],
)
def test_what_cannot_be_trained(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    plain = {"repeated_aug": False, "color_jitter": 0.0, "aa": None, "reprob": 0.0}
    with pytest.raises(InputError, match=words):
        train(configure(tmp_path, **{**plain, "mixup": 0.0, "cutmix": 0.0, **fields}))


def test_images_are_no_tokens(tmp_path: Path) -> None:
    config = make_config(model="encoder", data_set="DIGITS", output_dir=tmp_path, num_workers=0)
    with pytest.raises(InputError, match="encoder takes tokens, and --task classification gives"):
        train(config)


@pytest.mark.parametrize("command", ["cost", "tables energy"])
def test_commands_about_images_refuse_it(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command.split(), "--model", "encoder"]
    words += ["--output-dir", str(tmp_path)] if command != "cost" else []
    assert main(words) == 2
    assert "encoder takes sequences" in capsys.readouterr().err


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    model = create_model("encoder", "msa", **TOY_SIZES)
    with pytest.raises(InputError, match="of 49 tokens is longer than the model's 48 positions"):
        model(torch.zeros(1, 49, dtype=torch.int64))
