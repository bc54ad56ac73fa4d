from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ecoformer.config import Config, read_config, to_yaml
from ecoformer.config.file import read_fields
from ecoformer.errors import InputError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_round_trip(tmp_path: Path, changed: dict[str, Any]) -> None:
    for config in (Config(), Config.from_flat(changed)):
        path = write(tmp_path, "config.yaml", to_yaml(config))
        # The base proves that every field was written.
        assert Config.from_flat(read_fields(path), Config.from_flat(changed)) == config


def test_plain_and_released_form_are_the_same(tmp_path: Path) -> None:
    plain = write(tmp_path, "plain.py", '"""Doc."""\nnum_bits = 8\nlr = 5e-5\nclip_grad = None\n')
    released = write(tmp_path, "cfg.py", "cfg = dict(nbits=8, lr=5e-5, clip_grad=None)\n")
    # clip_grad is read, though it is the default.
    assert read_fields(plain) == {"num_bits": 8, "lr": 5e-5, "clip_grad": None}
    assert read_fields(released) == read_fields(plain)
    config = read_config(plain)
    assert (config.hashing.num_bits, config.optim.lr) == (8, 5e-5)
    assert read_config(released) == config


def test_released_names(tmp_path: Path) -> None:
    text = "cfg = dict(nbits=8, m=20, k=3, topk=5)\n"
    config = read_config(write(tmp_path, "a.py", text))
    assert (config.hashing.num_bits, config.hashing.num_anchors) == (8, 20)
    assert (config.hashing.num_similar, config.optim.refit_every_epochs) == (5, 3)
    assert read_config(write(tmp_path, "b.py", "anchor = 20")).hashing.num_anchors == 20


def test_base_files_and_code(tmp_path: Path) -> None:
    write(tmp_path, "base.py", "lr = 1.0\nepochs = 3\nopt_betas = (0.9, 0.95)\n")
    text = "import math\n_base_ = './base.py'\nepochs = int(math.sqrt(16))\n"
    optim = read_config(write(tmp_path, "a.py", text)).optim
    assert (optim.lr, optim.epochs, optim.opt_betas) == (1.0, 4, (0.9, 0.95))


def test_released_name_without_meaning_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_config(write(tmp_path, "a.py", "p = 6\nepochs = 3\n"))
    assert config == Config.from_flat({"epochs": 3})
    assert [r.getMessage() for r in caplog.records] == [
        "p has no meaning any more and is ignored: nothing reads it."
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.py", "epoch = 3", "unknown field epoch, did you mean 'epochs'?"),
        ("a.py", "cfg = dict(nbit=3)", "unknown field nbit, did you mean 'nbits'?"),
        ("a.py", "quux = 3", "unknown field quux."),
        ("a.py", "epochs = '3'", "epochs is '3'; expected int."),
        ("a.py", "epochs = -3", "epochs is -3; expected at least 0."),
        ("a.py", "nbits = 8\nnum_bits = 8", "num_bits is set twice, once as 'num_bits'; keep one."),
        ("a.py", "lr = 1.0\ncfg = dict(lr=1.0)", "lr is set twice, once in cfg; keep one."),
        ("a.py", "cfg = 3", "cfg is not a dict; write cfg = dict(...) or plain assignments."),
        ("a.py", "", "sets no field; write for example lr = 5e-5."),
        ("a.py", "cfg = dict()", "sets no field; write for example lr = 5e-5."),
        ("a.py", "lr = = 3", "cannot be read, SyntaxError: invalid syntax (<unknown>, line 1)."),
        ("a.py", "lr = 1 / 0", "cannot be read, ZeroDivisionError: division by zero."),
        ("a.py", "raise SystemExit(3)", "cannot be read, SystemExit: 3."),
        ("a.py", "raise ValueError('1\\n2')", "cannot be read, ValueError: 1 2."),
        ("a.py", "\0", "source code string cannot contain null bytes."),
        ("a.txt", "lr = 1.0", "is neither Python (.py) nor YAML (.yaml)."),
        ("a", "lr = 1.0", "is neither Python (.py) nor YAML (.yaml)."),
        ("a.yaml", "- 1", "sets no field; write for example lr = 5e-5."),
    ],
)
def test_bad_files(
    tmp_path: Path, name: str, text: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(InputError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"config file {path}: ")
    assert str(caught.value).endswith(expected)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    write(tmp_path, "pvt_v2_b0_msa.py", "lr = 1.0")
    with pytest.raises(InputError, match=r"does not exist, did you mean 'pvt_v2_b0_msa'\?$"):
        read_config(tmp_path / "pvt_v2_b0_mas.py")
    with pytest.raises(InputError, match=r"nowhere/a.py: does not exist\.$"):
        read_config(tmp_path / "nowhere" / "a.py")
    with pytest.raises(InputError, match=r"is a folder\.$"):
        read_config(tmp_path)
    broken_base = write(tmp_path, "a.py", "_base_ = './b.py'")
    with pytest.raises(InputError, match=r"a\.py: cannot be read, .*b\.py"):
        read_config(broken_base)


def test_file_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match="UnicodeDecodeError"):
        read_config(path)


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch {marker}']",
        "seed: !!python/object/new:os.system ['touch {marker}']",
        "seed: !!python/object/apply:subprocess.check_output [[touch, '{marker}']]",
        "seed: !!python/object/apply:builtins.eval [\"open('{marker}', 'w')\"]",
        "!!python/object/apply:os.system ['touch {marker}']: 3",
        "seed: !!python/name:os.system ''\nlr: 1.0",
        "seed: !!python/module:planted ''",
        "_base_: ./planted.py\nlr: 1.0",
        "_base_: [./planted.py]",
        "cfg: {{_base_: ./planted.py}}",
        "lr: '{{{{ $HOME:3 }}}}'\n_delete_: true",
    ],
)
@pytest.mark.parametrize("is_base", [False, True])
def test_yaml_runs_nothing(
    tmp_path: Path, text: str, is_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    write(tmp_path, "planted.py", f"open({str(marker)!r}, 'w').close()\nlr = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path, "config.yaml", text.format(marker=marker))
    if is_base:
        path = write(tmp_path, "a.py", "_base_ = './config.yaml'")
    with pytest.raises(InputError) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


# What would take minutes or all memory if it were read at all: the whole test has seconds.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "has an anchor"),
        ("a: &a [*a]", "has an anchor"),
        ("lr: *nowhere", "alias"),
        ("[" * 60_000, "nests deeper"),
        ("{a: " * 10_000, "nests deeper"),
        ("lr: 1\n" * 20_000, "has more than 64 kB"),
        ("seed: " + "9" * 60_000, "cannot be read, ValueError"),
        ("seed: 0x" + "f" * 60_000, "seed"),
        ("seed: " + "1:" * 20_000 + "1", "seed"),
        ("lr: [1.0, 2.0", "cannot be read, ParserError"),
        ("lr: 1.0\n---\nlr: 2.0", "cannot be read, ComposerError"),
        ("\x1b[2J: 1", "cannot be read, ReaderError"),
        ("1: 2", "unknown field 1"),
        ("3", "sets no field"),
    ],
    ids=lambda text: text[:12],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        read_config(write(tmp_path, "config.yaml", text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(InputError, match=r"is no regular file\.$"):
        read_config(tmp_path / "config.yaml")


def test_yaml_numbers_as_people_write_them(tmp_path: Path) -> None:
    text = "lr: 5e-5\ndata_path: 1e5\nclip_grad: none\namp_dtype: none\nepochs: '3'\n"
    config = read_config(write(tmp_path, "config.yml", text))
    assert (config.optim.lr, config.optim.clip_grad, config.optim.epochs) == (5e-5, None, 3)
    assert (config.data.data_path, config.run.amp_dtype) == ("1e5", "none")
