"""The command that prints what a model costs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pvt import get_energy

ROOT = Path(__file__).parents[2]
SMALL = ["--input-size", "64"]


def run(*words: str) -> int:
    return get_energy.main([*SMALL, *words])


def read_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert run(*words, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert isinstance(answer, dict)
    return answer


def test_totals_are_the_released_ones(capsys: pytest.CaptureFixture[str], golden_dir: Path) -> None:
    golden = json.loads((golden_dir / "cost.json").read_text())["pvt_v2_b0/ecoformer"]
    config = ROOT / "configs" / "pvt_v2" / "pvt_v2_b0_ecoformer.py"
    assert get_energy.main(["--config", str(config), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    for name in ("mul", "add", "energy_pj", "area_um2", "parameters"):
        assert answer[name] == golden[name]
    layers = [layer for layer in answer["layers"] if "attention" not in layer["kind"]]
    assert sum(layer["mul"] for layer in layers) == golden["layers"]


def test_table_holds_a_row_a_kind_and_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert get_energy.main(["--model", "pvt_v2_b0"]) == 0
    out = capsys.readouterr().out
    # Of the table, and of the totals below it.
    rows = dict(re.findall(r"^(?:\| )?(\w[\w ]*?) +[| ] *(\S.*?)(?: \|)?$", out, re.MULTILINE))
    expected = ["convolution", "normalisation", "linear", "ecoformer attention", "msa attention"]
    assert [name for name in rows if name in expected] == expected
    shares = [float(rows[name].split()[-1]) for name in expected]
    assert sum(shares) == pytest.approx(100, abs=0.05)
    assert rows["total"].split()[-1] == "100.00"
    assert rows["multiplications"] == "0.54 G"
    assert rows["additions"] == "0.56 G"
    assert rows["energy"] == "2.49 G pJ = 2.49 mJ"
    assert rows["area"] == "6.49 m^2"
    assert rows["parameters"] == "3.14 M"
    assert "45nm float32" in out


def test_another_node_and_precision_have_their_own_prices(
    capsys: pytest.CaptureFixture[str],
) -> None:
    paper = read_json(capsys)
    other = read_json(capsys, "--node", "7nm", "--precision", "bfloat16")
    assert (other["mul"], other["add"]) == (paper["mul"], paper["add"])
    assert other["energy_pj"] == pytest.approx(0.21 * paper["mul"] + 0.11 * paper["add"])
    assert paper["area_um2"] and other["area_um2"] is None
    assert other["traffic"]["fused"]["bytes"] == paper["traffic"]["fused"]["bytes"] / 2
    accesses = paper["traffic"]["with_maps"]["bytes"] / 8
    assert paper["traffic"]["with_maps"]["energy_pj"]["DRAM"] == [1300 * accesses, 2600 * accesses]


def test_traffic_stands_beside_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--attn_type", "msa") == 0
    out = capsys.readouterr().out
    fused, with_maps = re.findall(r"^(?:traffic|with N x N maps) +([\d.]+) MB", out, re.MULTILINE)
    assert float(fused) < float(with_maps)


def test_kinds_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    answer = read_json(capsys, "--attn_type", "msa")
    for name in ("mul", "add", "energy_pj"):
        total = sum(kind[name] for kind in answer["kinds"].values())
        assert total == pytest.approx(answer[name], rel=1e-12)


def test_flags_shape_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    published = read_json(capsys, "--model", "pvt_v2_b1")
    short = read_json(capsys, "--model", "pvt_v2_b1", "--nbits", "8", "--anchor", "10")
    assert (published["model"], published["attention"]) == ("pvt_v2_b1", "ecoformer")
    assert (short["hashing"]["num_bits"], short["hashing"]["num_anchors"]) == (8, 10)
    assert short["mul"] < published["mul"]
    assert short["parameters"] == published["parameters"]


def test_the_size_of_images_counts(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = read_json(capsys), read_json(capsys, "--input-size", "128")
    assert (small["input_size"], large["input_size"]) == ([64, 64], [128, 128])
    assert 3.9 * small["mul"] < large["mul"] < 4 * small["mul"]


@pytest.mark.parametrize(
    ("kind", "is_ours"), [("performer", True), ("sra", True), ("ecoformer", False), ("msa", False)]
)
def test_counts_without_a_released_figure_are_said_to_be_ours(
    kind: str, is_ours: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--attn_type", kind) == 0
    assert ("our own count" in capsys.readouterr().out) == is_ours


@pytest.mark.parametrize("place", [0, 2])
def test_json_goes_to_a_file_beside_the_table(
    place: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "cost.json"
    words = ["--attn_type", "msa"]
    words[place:place] = ["--json", str(file)]
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert "linear" in out and str(file) in out
    assert json.loads(file.read_text())["attention"] == "msa"


def test_json_without_a_file_may_stand_before_other_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--json", "--attn_type", "msa") == 0
    assert json.loads(capsys.readouterr().out)["attention"] == "msa"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modl", "pvt_v2_b0"], "unknown flag --modl, did you mean '--model'?"),
        (["--model", "pvt_v2_b9"], "unknown pvt model 'pvt_v2_b9'"),
        (["--model", "pvt_v2_b2_li", "--attn_type", "msa"], "it has: sra"),
        (["--config", "missing.py"], "missing.py"),
        (["--precision", "bfloat16"], "no published energy of bfloat16 operations at 45nm"),
        (["--json", "/dev/null/x.json"], "/dev/null/x.json: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_code_two(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_help_names_the_flags_that_matter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--json", "--config", "--model", "--nbits", "--input-size"))


@pytest.mark.parametrize(
    ("task", "flags", "size"),
    [
        ("detection", ["--data-set", "COCO", "--long-side", "160"], [96, 160]),
        ("segmentation", ["--data-set", "ADE20K"], [96, 96]),
    ],
)
def test_a_dense_task_counts_its_heads_at_its_own_size(
    task: str, flags: list[str], size: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", task, "--short-side", "96", *flags]
    assert get_energy.main(words) == 0
    assert capsys.readouterr().out.startswith(f"{task} by pvt_v2_b0, ecoformer attention, one")
    assert get_energy.main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["task"], answer["input_size"]) == (task, size)
    heads = [layer["mul"] for layer in answer["layers"] if ".body." not in layer["name"]]
    # By far the most, of 256 channels in each level.
    assert sum(heads) > answer["mul"] / 2
    assert any("choice of boxes count nothing" in note for note in answer["notes"])
