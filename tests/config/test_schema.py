from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from typing import Any, Literal

import pytest

from ecoformer.config import Config, describe_changes, schema
from ecoformer.config.types import read_words
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig


def test_defaults_are_the_released_recipe() -> None:
    flat = Config().to_flat()
    assert flat["lr"] == 5e-4
    assert flat["warmup_lr"] == 1e-6
    assert flat["min_lr"] == 1e-5
    assert flat["epochs"] == 300
    assert flat["aa"] == "rand-m9-mstd0.5-inc1"
    assert (flat["smoothing"], flat["mixup"], flat["cutmix"]) == (0.1, 0.8, 1.0)
    assert Config().hashing == HashConfig()


def test_field_names_are_unique_over_sections() -> None:
    sections = [getattr(Config(), section.name) for section in fields(Config)]
    names = [setting.name for section in sections for setting in fields(section)]
    assert len(names) == len(set(names))
    assert set(names) == set(Config().to_flat())


def test_every_field_is_documented() -> None:
    classes = [n for n in ast.parse(inspect.getsource(schema)).body if isinstance(n, ast.ClassDef)]
    assert len(classes) == 7
    for section in classes[:-1]:
        for setting, text in zip(section.body, section.body[1:], strict=False):
            if isinstance(setting, ast.AnnAssign):
                assert isinstance(text, ast.Expr), ast.unparse(setting)


def test_flat_round_trip(changed: dict[str, Any]) -> None:
    config = Config.from_flat(changed)
    assert config.to_flat() == changed
    assert Config.from_flat(config.to_flat()) == config


def test_changed_differs_in_every_field_but_the_file(changed: dict[str, Any]) -> None:
    # Guards the round trips: a field left at its default would prove nothing.
    assert set(describe_changes({}, changed)) == set(Config().to_flat()) - {"config"}


def test_from_flat_keeps_the_base() -> None:
    base = Config.from_flat({"lr": 1.0, "epochs": 3})
    config = Config.from_flat({"epochs": 4}, base)
    assert (config.optim.lr, config.optim.epochs) == (1.0, 4)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 3.0, "epochs is 3.0; expected int."),
        ("epochs", True, "epochs is True; expected int."),
        ("lr", "5e-5", "lr is '5e-5'; expected float."),
        ("eval", 1, "eval is 1; expected bool."),
        ("clip_grad", "none", "clip_grad is 'none'; expected float or None."),
        ("opt_betas", [0.9], "expected a list of float or None."),
        ("lr_noise", ["a"], "expected a list of float or None."),
        ("mixup_mode", "all", "expected 'batch' or 'pair' or 'elem'."),
        ("data_path", ["a"], "expected str or None."),
        ("epoch", 3, "there is no field 'epoch', did you mean 'epochs'?"),
    ],
)
def test_wrong_names_and_types(name: str, value: object, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        Config.from_flat({name: value})
    assert str(caught.value).endswith(expected)


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_bits", (0, -1)),
        ("num_anchors", (0,)),
        ("refit_every_epochs", (0,)),
        ("drop_path", (-0.1, 1.0, NAN)),
        ("input_size", (31,)),
        ("batch_size", (0,)),
        ("num_workers", (-1,)),
        ("max_bad_images", (-1,)),
        ("smoothing", (-0.1, 1.0)),
        ("mixup", (-0.1, NAN)),
        ("mixup_prob", (-0.1, 1.1)),
        ("scale", ([0.0, 1.0], [0.9, 0.2], [0.2, 1.1])),
        ("hflip", (-0.1, 1.1)),
        ("cutmix_minmax", ([0.8, 0.2], [-0.1, 0.2], [0.2, 1.1], [0.5, 0.5])),
        ("lr", (-1e-5, NAN, float("inf"))),
        ("clip_grad", (0.0, -1.0)),
        ("opt_betas", ([0.9, 1.0], [0.9, NAN])),
        ("lr_noise", ([], [0.1, 0.2, 0.3], [1.5])),
        ("epochs", (-1,)),
        ("grad_accum_steps", (0,)),
        ("seed", (-1,)),
        ("checkpoint_every", (-1.0,)),
        ("distill_weight", (-1.0, NAN, float("inf"))),
        ("align_steps", (-1,)),
        ("dist_timeout", (0.0, NAN, float("inf"))),
    ],
)
def test_values_out_of_range(name: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(InputError, match=rf"^{name} .*\.$"):
            Config.from_flat({name: value})


def test_eval_mode_exactly_when_fine_tuning() -> None:
    assert Config().run.is_train_mode
    assert not Config.from_flat({"finetune": "a.pth"}).run.is_train_mode
    assert Config.from_flat({"finetune": "a.pth", "train_mode": True}).run.is_train_mode
    assert not Config.from_flat({"train_mode": False}).run.is_train_mode


def test_describe_changes() -> None:
    old, new = Config().to_flat(), Config.from_flat({"lr": 1e-3, "aa": None}).to_flat()
    assert describe_changes(old, old) == {}
    assert describe_changes(old, new) == {
        "lr": "0.0005 -> 0.001",
        "aa": "'rand-m9-mstd0.5-inc1' -> None",
    }
    # A field that an older checkpoint lacks had its default.
    del old["aa"], old["seed"]
    assert set(describe_changes(old, new)) == {"lr", "aa"}
    # A field that is gone since then is told.
    assert describe_changes({"gone": 3}, {}) == {"gone": "3 -> None"}


@pytest.mark.parametrize(
    ("words", "hint", "value"),
    [
        ("3", int, 3),
        ("3.0", int, "3.0"),
        ("5e-5", float, 5e-5),
        ("x", float, "x"),
        ("1e5", str, "1e5"),
        ("None", str, "None"),
        ("NONE", float | None, None),
        ("none", Literal["none", "float16"] | None, "none"),
        ("none", Literal["released"] | None, None),
        (["0.9", "1"], tuple[float, float], [0.9, 1.0]),
        (["0.9", "x"], tuple[float, ...], [0.9, "x"]),
        (["none"], tuple[float, ...] | None, None),
        (["config"], tuple[Literal["config"], ...], ["config"]),
    ],
)
def test_words(words: str | list[str], hint: Any, value: object) -> None:
    read = read_words(words, hint)
    assert (read, type(read)) == (value, type(value))
