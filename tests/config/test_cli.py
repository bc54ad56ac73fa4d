from __future__ import annotations

import logging
import random
import shlex
from pathlib import Path
from typing import Any

import pytest

from ecoformer.config import Config, make_config, parse_config
from ecoformer.config.released import SPELLINGS, WITHOUT_MEANING
from ecoformer.errors import InputError, print_error
from ecoformer.hash_config import HashConfig
from ecoformer.models.registry import ModelFamily

CONFIGS = Path(__file__).parents[2] / "configs"


def flat(family: ModelFamily, line: str) -> dict[str, Any]:
    return parse_config(shlex.split(line), family).to_flat()


def flags_of(values: dict[str, Any]) -> list[str]:
    """The command line that sets each of these fields."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            listed = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, listed)]
    return words


def test_later_sources_win(pvt: ModelFamily, tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("lr = 1.0\nclip_grad = 2.0\nmomentum = 0.7\n")
    family = ModelFamily(
        name="pvt",
        variants=pvt.variants,
        default_model="pvt_v2_b1",
        recipe={"lr": 3.0, "drop_path": 0.4, "epochs": 7},
    )
    config = parse_config(["--momentum", "0.8", "--config", str(path), "--epochs", "8"], family)
    assert config.optim.opt == "adamw"
    assert config.model.model == "pvt_v2_b1"
    assert config.model.drop_path == 0.4
    assert (config.optim.lr, config.optim.clip_grad) == (1.0, 2.0)
    assert (config.optim.momentum, config.optim.epochs) == (0.8, 8)
    # The command line can take back what a file says.
    assert (
        parse_config(["--config", str(path), "--clip-grad", "none"], family).optim.clip_grad is None
    )


def test_every_field_has_a_flag(pvt: ModelFamily, changed: dict[str, Any]) -> None:
    del changed["config"]
    assert parse_config(flags_of(changed), pvt).to_flat() == changed | {"config": None}


def test_released_pvt_commands(pvt: ModelFamily) -> None:
    line = (
        "--config {} --batch-size 32 --data-path IMAGENET --data-set IMNET --epochs {} "
        "--lr 5e-5 --warmup-lr 1e-7 --min-lr 1e-6 --finetune {}"
    )
    stages = [("pvt_v2_b0_msa", 100, "msa"), ("pvt_v2_b0_ecoformer", 30, "ecoformer")]
    for name, epochs, kind in stages:
        file = CONFIGS / "pvt_v2" / f"{name}.py"
        config = parse_config(shlex.split(line.format(file, epochs, "WEIGHTS")), pvt)
        assert (config.model.model, config.model.attn_type) == ("pvt_v2_b0", kind)
        assert (config.optim.epochs, config.optim.lr) == (epochs, 5e-5)
        assert (config.optim.warmup_lr, config.optim.min_lr) == (1e-7, 1e-6)
        assert (config.data.data_path, config.data.batch_size) == ("IMAGENET", 32)
        assert (config.run.finetune, config.run.output_dir) == ("WEIGHTS", f"runs/{name}")
        assert config.data.repeated_aug
        assert config.optim.clip_grad is None
        # What the released command spells out is what the file says by itself.
        short = f"--config {file} --data-path IMAGENET --finetune WEIGHTS"
        assert parse_config(shlex.split(short), pvt) == config


def test_released_twins_command(twins: ModelFamily) -> None:
    config = parse_config(
        shlex.split(
            "--model alt_gvt_small_ecoformer --batch-size 32 --data-path IMAGENET --data-set IMNET "
            "--dist-eval --nbits 16 --anchor 25 --topk 10 --k 300 --epochs 30 --lr 25e-5 "
            "--warmup-lr 5e-7 --min-lr 1e-6 --drop-path 0.2 --finetune STAGE1 --output_dir OUT"
        ),
        twins,
    )
    assert (config.model.model, config.model.attn_type) == ("alt_gvt_small", "ecoformer")
    assert not config.data.repeated_aug
    assert (config.optim.clip_grad, config.model.drop_path) == (5.0, 0.2)
    file = CONFIGS / "twins" / "alt_gvt_small_ecoformer.py"
    short = f"--config {file} --data-path IMAGENET --finetune STAGE1 --output_dir OUT"
    by_file = parse_config(shlex.split(short), twins).to_flat()
    assert by_file == config.to_flat() | {"config": str(file)}


def test_evaluation_and_throughput(pvt: ModelFamily) -> None:
    config = parse_config(shlex.split("--resume https://a.org/b.pth --eval"), pvt)
    assert config.run.eval
    assert config.run.resume == "https://a.org/b.pth"
    assert parse_config([], pvt).run.throughput is None
    assert parse_config(["--throughput"], pvt).run.throughput == "median"
    assert parse_config(["--throughput", "--eval"], pvt).run.throughput == "median"
    assert parse_config(["--throughput", "released"], pvt).run.throughput == "released"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--nbits 8", "num_bits", 8),
        ("--num-bits 8", "num_bits", 8),
        ("--num_bits=8", "num_bits", 8),
        ("--nbits 4 --num-bits 8", "num_bits", 8),
        ("--anchor 20", "num_anchors", 20),
        ("--num-anchors 20", "num_anchors", 20),
        ("--topk 5", "num_similar", 5),
        ("--num-similar 5", "num_similar", 5),
        ("--k 7", "refit_every_epochs", 7),
        ("--refit-every-epochs 7", "refit_every_epochs", 7),
        ("--dr 0.5", "decay_rate", 0.5),
        ("--output-dir a_b-c", "output_dir", "a_b-c"),
        ("--output_dir=a_b-c", "output_dir", "a_b-c"),
        ("--num-workers 0", "num_workers", 0),
        ("--start_epoch 3", "start_epoch", 3),
        ("--clip-grad 5", "clip_grad", 5.0),
        ("--clip-grad None", "clip_grad", None),
        ("--clip-grad none", "clip_grad", None),
        ("--aa none", "aa", None),
        ("--aa v0", "aa", "v0"),
        # Off in the released scripts, too.
        ("--aa ''", "aa", None),
        ("--aa=", "aa", None),
        ("--opt-betas ''", "opt_betas", None),
        ("--throughout", "throughput", "median"),
        ("--resume none", "resume", None),
        ("--amp-dtype none", "amp_dtype", "none"),
        ("--amp_dtype bfloat16", "amp_dtype", "bfloat16"),
        ("--opt-betas 0.9 0.95", "opt_betas", [0.9, 0.95]),
        ("--lr-noise 0.4 0.9", "lr_noise", [0.4, 0.9]),
        ("--lr-noise 0.4", "lr_noise", [0.4]),
        ("--cutmix-minmax 0.2 0.8", "cutmix_minmax", [0.2, 0.8]),
        ("--no-pin-mem", "pin_mem", False),
        ("--no-pin-mem --pin-mem", "pin_mem", True),
        ("--no-repeated-aug", "repeated_aug", False),
        ("--no_repeated_aug", "repeated_aug", False),
        ("--repeated-aug", "repeated_aug", True),
        ("--train-mode", "train_mode", True),
        ("--no-train-mode", "train_mode", False),
        ("--no_train_mode --eval", "train_mode", False),
        ("--train-mode none", "train_mode", None),
        ("--lr 25e-5", "lr", 25e-5),
        (
            "--allow-resume-change config batch-size",
            "allow_resume_change",
            ["config", "batch-size"],
        ),
        # An empty value, as from an unset shell variable, is no value.
        ("--finetune ''", "finetune", None),
        ("--resume ''", "resume", "auto"),
        ("--output_dir=", "output_dir", "runs/pvt_v2_b0"),
    ],
)
def test_spellings(pvt: ModelFamily, line: str, name: str, value: object) -> None:
    expected = parse_config([], pvt).to_flat()
    if "--eval" in line:
        expected["eval"] = True
    assert flat(pvt, line) == expected | {name: value}


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--p 6", ["--p"]),
        ("--world_size 8 --dist-url env://", ["--world_size", "--dist-url"]),
        ("--local_rank=0", ["--local_rank"]),
        ("--use-mcloader --fp32-resume", ["--use-mcloader", "--fp32-resume"]),
        ("--inat-category name", ["--inat-category"]),
        (
            "--dist-eval --resplit --cooldown-epochs 5",
            ["--dist-eval", "--resplit", "--cooldown-epochs"],
        ),
        ("--stage3_alpha 0.5 --num_features 256", ["--stage3_alpha", "--num_features"]),
    ],
)
def test_released_flags_without_meaning(
    pvt: ModelFamily,
    line: str,
    names: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = Config.from_flat({"epochs": 3}, parse_config([], pvt))
    assert parse_config(shlex.split(f"{line} --epochs 3"), pvt) == expected
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split()[0] for message in messages] == names
    assert all("has no meaning any more and is ignored" in message for message in messages)
    # One voice is enough.
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    assert parse_config(shlex.split(f"--epochs 3 {line}"), pvt) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--batchsize 3", "unknown flag --batchsize, did you mean '--batch-size'?"),
        ("--topkk=3", "unknown flag --topkk, did you mean '--topk'?"),
        ("--warmup_epoch 3", "unknown flag --warmup_epoch, did you mean '--warmup-epochs'?"),
        ("--no-pin-memory", "unknown flag --no-pin-memory, did you mean '--pin-mem'?"),
        ("--no-lr", "unknown flag --no-lr, did you mean"),
        ("--zzzzzzzzzzzz", "unknown flag --zzzzzzzzzzzz."),
        ("train", "unexpected 'train'; every setting is a --flag, see --help."),
        ("--config no/such.py", "config file no/such.py: does not exist."),
        ("--model pvt_v2_b9", "unknown pvt model 'pvt_v2_b9', did you mean"),
        (
            "--attn_type lsa_gsa",
            "pvt_v2_b0 has no attention kind 'lsa_gsa'; it has: ecoformer, msa",
        ),
        (
            "--model pvt_v2_b2_li --attn_type msa",
            "pvt_v2_b2_li has no attention kind 'msa'; it has",
        ),
    ],
)
def test_what_does_not_exist(pvt: ModelFamily, line: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(shlex.split(line), pvt)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--epochs three", "--epochs"),
        ("--epochs", "--epochs"),
        ("--epochs 3 4", "4"),
        ("--eval now", "now"),
        ("--sched cosin", "--sched is 'cosin'; expected 'cosine' or"),
        ("--lr x", "--lr is 'x'; expected float."),
        ("--seed 9223372036854775808", "--seed has 64 bits"),
        ("--train-mode now", "--train-mode is 'now'; expected bool or None."),
        ("--opt-betas 0.9", "--opt-betas"),
        ("--throughput fast", "--throughput"),
        ("--config", "--config"),
        ("--smoothing 1.5", "smoothing is 1.5; expected in [0, 1)."),
        ("--nbits 0", "num_bits must be at least 1"),
    ],
)
def test_values_that_do_not_fit(
    pvt: ModelFamily,
    line: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(InputError) as caught:
            parse_config(shlex.split(line), pvt)
        assert caught.value.exit_code == 2
        # One line, and nothing printed beside it.
        message = str(caught.value)
        assert expected in message and "\n" not in message and "│" not in message
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("line", ["--help", "-h", "--eval --help", "--eval -h"])
def test_help(twins: ModelFamily, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(shlex.split(line), twins)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "python -m twins.main" in text
    for name in Config().to_flat():
        assert f"--{name.replace('_', '-')}" in text
    for spelling in ("--nbits ", "--anchor ", "--topk ", "--k "):
        assert spelling in text


@pytest.mark.parametrize(
    ("line", "model", "kind", "folder"),
    [
        ("", "alt_gvt_small", "ecoformer", "alt_gvt_small_ecoformer"),
        ("--attn_type msa", "alt_gvt_small", "msa", "alt_gvt_small_msa"),
        ("--model alt_gvt_base_ecoformer", "alt_gvt_base", "ecoformer", "alt_gvt_base_ecoformer"),
        (
            "--model alt_gvt_small_sra_to_msa --train_msa",
            *("alt_gvt_small", "lsa_msa", "alt_gvt_small_sra_to_msa"),
        ),
        ("--model alt_gvt_small --train_msa", "alt_gvt_small", "msa", "alt_gvt_small"),
        ("--model pcpvt_small_v0", "pcpvt_small_v0", "sra", "pcpvt_small_v0"),
        ("--model pcpvt_small_v0 --train_msa", "pcpvt_small_v0", "msa", "pcpvt_small_v0_msa"),
        (
            "--model pcpvt_small_v0 --attn_type ecoformer",
            *("pcpvt_small_v0", "ecoformer", "pcpvt_small_v0_ecoformer"),
        ),
        (
            "--model alt_gvt_small_ecoformer --attn_type msa",
            *("alt_gvt_small", "msa", "alt_gvt_small_msa"),
        ),
        (
            "--model alt_gvt_small_ecoformer --attn_type msa --train_msa",
            *("alt_gvt_small", "msa", "alt_gvt_small_msa"),
        ),
    ],
)
def test_names_of_models_and_folders(
    twins: ModelFamily, line: str, model: str, kind: str, folder: str
) -> None:
    config = parse_config(shlex.split(line), twins)
    assert (config.model.model, config.model.attn_type) == (model, kind)
    assert config.run.output_dir == f"runs/{folder}"


@pytest.mark.parametrize(
    "line",
    [
        "--train_msa --model alt_gvt_small_ecoformer",
        "--train_msa --model alt_gvt_small --attn_type ecoformer",
        "--train_msa --model alt_gvt_small --attn_type lsa_gsa",
    ],
)
def test_train_msa_wants_a_softmax_model(twins: ModelFamily, line: str) -> None:
    with pytest.raises(InputError, match=r"^--train_msa "):
        parse_config(shlex.split(line), twins)


def test_train_msa_blames_nobody_for_a_name_that_was_not_given(twins: ModelFamily) -> None:
    with pytest.raises(InputError, match=r"the default model alt_gvt_small_ecoformer .* --model"):
        parse_config(["--train_msa"], twins)


def test_released_name_beats_the_attention_of_a_file(twins: ModelFamily, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("model = 'alt_gvt_small'\nattn_type = 'lsa_gsa'\n")
    assert flat(twins, f"--config {path}")["attn_type"] == "lsa_gsa"
    assert flat(twins, f"--config {path} --model alt_gvt_base")["attn_type"] == "lsa_gsa"
    changed = flat(twins, f"--config {path} --model alt_gvt_base_ecoformer")
    assert (changed["model"], changed["attn_type"]) == ("alt_gvt_base", "ecoformer")
    changed = flat(twins, f"--config {path} --model alt_gvt_base_ecoformer --attn_type msa")
    assert (changed["model"], changed["attn_type"]) == ("alt_gvt_base", "msa")


def test_a_run_starts_again_from_its_own_file(pvt: ModelFamily, tmp_path: Path) -> None:
    from ecoformer.config import to_yaml

    first = parse_config(["--model", "pvt_v2_b1", "--attn_type", "msa", "--lr", "1e-3"], pvt)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(first), encoding="utf-8")
    again = parse_config(["--config", str(path)], pvt)
    assert again.to_flat() == first.to_flat() | {"config": str(path)}


def test_a_configuration_from_python(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("lr = 1.0\nepochs = 3\n")
    config = make_config(model="alt_gvt_small", config=str(path), epochs=4, opt_betas=[0.9, 0.95])
    line = f"--model alt_gvt_small --config {path} --epochs 4 --opt-betas 0.9 0.95"
    assert config == parse_config(shlex.split(line))
    assert (config.optim.lr, config.optim.epochs, config.model.attn_type) == (1.0, 4, "msa")
    # The recipe of the family that the model belongs to, named or in a file.
    assert config.optim.clip_grad == 5.0
    path.write_text("model = 'pvt_v2_b1'\n")
    assert make_config(config=str(path)).optim.clip_grad is None
    with pytest.raises(InputError, match=r"^epochs is '3'; expected int\.$"):
        make_config(model="pvt_v2_b0", epochs="3")
    with pytest.raises(InputError, match="there is no field 'epoch', did you mean 'epochs'"):
        make_config(model="pvt_v2_b0", epoch=3)
    with pytest.raises(InputError, match="did you mean 'model'"):
        make_config(mdoel="pvt_v2_b0")
    hashing = HashConfig(num_bits=8, value_bias="normalized")
    config = make_config(model="pvt_v2_b0", hashing=hashing, output_dir=Path("runs", "a"))
    assert (config.hashing, config.run.output_dir) == (hashing, "runs/a")
    with pytest.raises(InputError, match="name a model"):
        make_config(epochs=3)


@pytest.mark.parametrize(
    ("family", "line", "expected"),
    [
        (
            "pvt",
            "",
            "pvt_v2_b0 without --attn_type: taken as ecoformer; the released scripts built sra "
            "(--attn_type sra)",
        ),
        ("pvt", "--model pvt_v2_b1", "pvt_v2_b1 without --attn_type: taken as ecoformer;"),
        ("pvt", "--config {released}", "pvt_v2_b2 without --attn_type: taken as ecoformer;"),
        ("pvt", "--attn_type ecoformer", None),
        ("pvt", "--config {released} --attn_type sra", None),
        # It has no other.
        ("pvt", "--model pvt_v2_b2_li", None),
        ("twins", "", None),
        (
            "twins",
            "--model alt_gvt_small",
            "alt_gvt_small without --attn_type: taken as msa, as released; twins.create_model "
            "builds ecoformer",
        ),
        ("twins", "--model pcpvt_base_v0", "pcpvt_base_v0 without --attn_type: taken as sra,"),
        ("twins", "--model alt_gvt_small --attn_type msa", None),
        ("twins", "--model alt_gvt_small_ecoformer", None),
        ("twins", "--model alt_gvt_small_sra_to_msa", None),
    ],
)
def test_what_a_model_without_attention_is_taken_for(
    request: pytest.FixtureRequest,
    family: str,
    line: str,
    expected: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "ecoformer")
    (tmp_path / "b2.py").write_text("cfg = dict(model='pvt_v2_b2', drop_path=0.1)")
    words = shlex.split(line.format(released=tmp_path / "b2.py"))
    parse_config(words, request.getfixturevalue(family))
    messages = [record.getMessage() for record in caplog.records]
    assert [message[: len(expected or "")] for message in messages] == [expected] * bool(expected)
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    parse_config(words, request.getfixturevalue(family))
    assert not caplog.records


NASTY = [
    *("", "0", "-1", "1", "0.5", "1e400", "nan", "-inf", "none", "None", "True", "x", "[1]", "1,2"),
    *(
        "9223372036854775807",
        "9" * 5000,
        "\udcff",
        "\x1b[2J",
        "a b",
        "-",
        "--",
        "a=b",
        "0x10",
        "1_0",
    ),
]


@pytest.mark.parametrize("seed", range(3))
def test_random_command_lines(
    pvt: ModelFamily, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """R18, up to the configuration: settings, or one line."""
    draw = random.Random(seed)
    names = [*Config().to_flat(), *SPELLINGS, *WITHOUT_MEANING, "help", "quux"]
    prefixes = ["--"] * 5 + ["--no-", "-"]
    for _ in range(100):
        words: list[str] = []
        for _ in range(draw.randint(1, 6)):
            flag = draw.choice(prefixes) + draw.choice(names)
            flag = flag.replace("_", "-") if draw.random() < 0.5 else flag
            values = draw.choices(NASTY, k=draw.choice([0, 1, 1, 1, 2]))
            equals = values and draw.random() < 0.3
            words += [f"{flag}={values[0]}"] if equals else [flag, *values]
        try:
            parse_config(words, pvt)
        except InputError as error:
            assert str(error)
            print_error(error)
        except SystemExit as stop:
            assert not stop.code
        assert capsys.readouterr().err.count("\n") <= 1, words
