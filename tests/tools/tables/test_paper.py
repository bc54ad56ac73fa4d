"""The index of the paper: nothing guessed, and no row without a command or a reason."""

from __future__ import annotations

import json
import shlex
from functools import cache
from pathlib import Path

import pytest

from ecoformer.tools.table import Value
from ecoformer.tools.tables import paper
from ecoformer.tools.tables.command import main
from ecoformer.tools.tables.paper import WORDS, Results, describe_paper
from tests.test_readmes import run_command
from tests.tools.tables.conftest import Refuse

# Counted once for all tests.
count_models, count_one = cache(paper.describe_models), cache(paper.describe_cost)
RESULTS = Path(__file__).parents[3] / ".github" / "results"


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "describe_models", count_models)
    monkeypatch.setattr(paper, "describe_cost", count_one)


@cache
def describe(folder: Path = RESULTS) -> list[dict[str, Value]]:
    return describe_paper(Results(folder))


def name(row: dict[str, Value]) -> tuple[Value, Value, Value]:
    return row["table"], row["row"], row["quantity"]


def test_every_table_is_there() -> None:
    tables = list(dict.fromkeys(row["table"] for row in describe()))
    assert tables == [
        "energy and area of an operation",
        "models, ImageNet-1k",
        "kinds of attention",
        "bits of a code",
        "anchors",
        "similar pairs a token",
        "long sequences",
        "figures",
    ]
    assert len({name(row) for row in describe()}) == len(describe())
    quantities = {row["quantity"] for row in describe() if row["row"] == "pvt_v2_b0/msa"}
    assert len(quantities) == 6


@pytest.mark.parametrize("folder", [RESULTS, Path("no such folder")])
def test_every_row_has_a_word_and_a_command_or_a_reason(folder: Path) -> None:
    for row in describe(folder):
        assert row["word"] in WORDS, name(row)
        assert row.get("command") or row.get("note"), name(row)
        is_filled = row["word"] != "not run"
        assert bool(row.get("ours")) is is_filled, name(row)
        if is_filled:
            assert row["command"], name(row)
        if row["word"] in ("stand-in", "not run"):
            assert row["note"], name(row)


def test_commands_are_accepted() -> None:
    commands = {str(row["command"]) for row in describe() if row.get("command")}
    assert len(commands) > 10
    for command in commands:
        run_command(shlex.split(command.replace("=CHECKPOINT", "=x.pth")), dry=True)


def test_published_values_are_the_released_ones_and_have_a_source(golden_dir: Path) -> None:
    released = json.loads((golden_dir / "published_table.json").read_text())
    fields = {
        "#Mul, G": "mul_g",
        "#Add, G": "add_g",
        "energy, mJ": "energy_g_pj",
        "images/s, RTX 3090, batches of 32": "throughput_img_s",
        "top-1, ImageNet-1k, %": "top1",
    }
    models = [row for row in describe() if row["table"] == "models, ImageNet-1k"]
    published = {
        (row["row"], row["quantity"]): row["published"] for row in models if "published" in row
    }
    assert published == {
        (f"{variant}/ecoformer", quantity): entry[field]
        for variant, entry in released.items()
        for quantity, field in fields.items()
    }
    for row in describe():
        assert ("published" in row) is bool(row.get("source")), name(row)
    # Besides: premises, the abstract's two, four of the open harness of long sequences.
    others = [row for row in describe() if "published" in row and row not in models]
    assert len(others) == 4 + 2 + 4
    assert {row["published"] for row in others[4:]} == {73, 0.33, 38.37, 38.02, 65.26, 66.3}


def test_recomputed_values_are_the_published_ones_but_for_the_slip() -> None:
    different = []
    for row in describe():
        if row["word"] == "recomputed" and "published" in row:
            digits = len(f"{row['published']:g}".partition(".")[2])
            if f"{float(str(row['ours'])):.{digits}f}" != f"{row['published']:.{digits}f}":
                different.append(row)
    (slip,) = different
    assert (slip["row"], slip["published"], slip["ours"]) == ("pvt_v2_b3/ecoformer", 6.75, "6.72")
    assert "slip" in str(slip["note"])


def write(
    folder: Path, table: str, cells: dict[str, Value], note: str = "", hardware: str = "a CPU"
) -> None:
    content = {"rows": [cells], "notes": [note], "environment": {"hardware": hardware}}
    (folder / f"{table}.json").write_text(json.dumps(content))


def find(folder: Path, row: str, quantity: str) -> dict[str, Value]:
    rows = describe_paper(Results(folder))
    (found,) = (r for r in rows if (r["row"], r["quantity"]) == (row, quantity))
    return found


@pytest.mark.parametrize(
    ("note", "word"),
    [("pvt_v2_b0, FMNIST, 32 px. Costs", "stand-in"), ("pvt_v2_b0, IMNET, 224 px. C", "measured")],
)
def test_other_data_are_a_stand_in(note: str, word: str, tmp_path: Path) -> None:
    cells: dict[str, Value] = {
        "name": "EcoFormer",
        "top1": 84.207,
        "top1_ci95": 0.726,
        "num_seeds": 3,
        "epochs": 2,
    }
    write(tmp_path, "kinds", cells, note)
    row = find(tmp_path, "PVTv2-B0, EcoFormer", "top-1, %")
    assert (row["ours"], row["word"]) == ("84.21 +- 0.73", word)
    assert "3 seeds" in str(row["note"])
    assert ("in place of ImageNet" in str(row["note"])) == (word == "stand-in")


@pytest.mark.parametrize(
    ("hardware", "batch_size", "word"),
    [
        ("AMD EPYC, 2 threads", "32", "stand-in"),
        ("NVIDIA GeForce RTX 3090; x, 2 threads", "32", "measured"),
        ("NVIDIA GeForce RTX 3090; x, 2 threads", "8", "stand-in"),
    ],
)
def test_other_hardware_is_a_stand_in(
    hardware: str, batch_size: str, word: str, tmp_path: Path
) -> None:
    model = "pvt_v2_b0/ecoformer"
    cells: dict[str, Value] = {"name": model, "images_per_s": 12.34567, "batch_size": batch_size}
    write(tmp_path, "main", cells, hardware=hardware)
    row = find(tmp_path, model, "images/s, RTX 3090, batches of 32")
    assert (row["ours"], row["word"], row["published"]) == ("12.35", word, 1379)
    assert hardware in str(row["note"])


def test_the_command_writes_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "describe_paper", lambda results: describe())
    assert main(["paper", "--results", str(RESULTS), "--output-dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "paper.json").read_text())["rows"] == describe()


def test_results_that_are_not_there(refuse: Refuse, tmp_path: Path) -> None:
    assert "no such folder" in refuse("paper", "--results", str(tmp_path / "none"))
