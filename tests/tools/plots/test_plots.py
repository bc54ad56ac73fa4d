"""Pictures: what they show is what the models compute, and bad input is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.lines import Line2D
from torch import nn

import pvt
from ecoformer.attention import EcoFormerAttention
from ecoformer.cost import find_prices
from ecoformer.engine.run import load_run
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import with_random_hash_functions
from ecoformer.ops import hash_attention
from ecoformer.ops.attention import ValueBias
from ecoformer.tools.plots.codes import Pair, view_token
from ecoformer.tools.plots.command import main
from ecoformer.tools.plots.curves import draw_curves, draw_tradeoff
from ecoformer.tools.plots.energy import draw_energy
from ecoformer.tools.tables.energy import describe_energy

LAYER = "block1.0.attn"
PNG = b"\x89PNG\r\n"


def make_models(value_bias: ValueBias = "released") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    hashing = HashConfig(value_bias=value_bias)
    models = [
        with_random_hash_functions(
            pvt.create_model("pvt_v2_b0", kind, num_classes=10, hashing=hashing)
        ).eval()
        for kind in ("msa", "ecoformer")
    ]
    return models[0], models[1]


def points(line: Line2D) -> list[list[float]]:
    return np.asarray(line.get_xydata()).tolist()


@pytest.mark.parametrize("value_bias", ["released", "normalized"])
def test_a_token_sees_what_its_layer_computes(value_bias: ValueBias) -> None:
    softmax, ecoformer = make_models(value_bias)
    image = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    given: list[torch.Tensor] = []
    layer = ecoformer.get_submodule(LAYER)
    assert isinstance(layer, EcoFormerAttention)
    hook = layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    view = view_token(softmax, ecoformer, image, LAYER, (3, 5))
    hook.remove()
    assert view.softmax.shape == view.codes.shape == view.equal_bits.shape == (8, 16)
    assert view.softmax.sum() == pytest.approx(1)
    assert view.softmax.min() >= 0

    with torch.inference_mode():
        # The first stage has one head.
        rows, v = layer.split_heads(layer.to_qk(given[0]), layer.to_v(given[0]))
        codes = layer.hash.encode(rows)
        out = hash_attention(codes, v, value_bias)[0, 0, 3 * 16 + 5]
    torch.testing.assert_close(view.codes.flatten() @ v[0, 0], out)
    shared = (codes[0, 0] @ codes[0, 0, 3 * 16 + 5] + 16) / 32
    torch.testing.assert_close(view.equal_bits.flatten(), shared)


@pytest.mark.parametrize(
    ("layer", "token", "words"),
    [
        (LAYER, (8, 0), "--token 8 0: the map of block1.0.attn is 8 x 8"),
        (LAYER, (0, -1), "--token 0 -1"),
        ("block4.0.attn", (0, 0), "no EcoFormerAttention there; there is one at: block1.0.attn"),
    ],
)
def test_what_cannot_be_seen(layer: str, token: tuple[int, int], words: str) -> None:
    softmax, ecoformer = make_models()
    with pytest.raises(InputError, match=words):
        view_token(softmax, ecoformer, torch.zeros(1, 3, 32, 32), layer, token)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Two finished runs on digits, but for the training."""
    folders = {}
    for kind, model in zip(("msa", "ecoformer"), make_models(), strict=True):
        folders[kind] = tmp_path / kind
        folders[kind].mkdir()
        torch.save(model.state_dict(), folders[kind] / "last_checkpoint.pth")
        settings = f"model: pvt_v2_b0\nattn_type: {kind}\ndata_set: DIGITS\ninput_size: 32\n"
        (folders[kind] / "config.yaml").write_text(settings)
        records = [{"epoch": e, "train_loss": 2.0 - e, "test_acc1": 50.0 + e} for e in range(2)]
        (folders[kind] / "log.txt").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folders


def test_each_command_writes_a_picture(runs: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    row = {"name": "softmax", "energy_pj": 1e9, "top1": 80.0, "top1_ci95": 0.5}
    table.write_text(json.dumps({"rows": [row]}))
    both = [str(run) for run in runs.values()]
    for number, words in enumerate(
        (
            ["method"],
            ["cost", "--resolutions", "32", "64"],
            ["energy", "--input-size", "32", "64"],
            ["curves", *both],
            ["tradeoff", str(table)],
            ["codes", "--softmax", both[0], "--ecoformer", both[1], "--image", "3"],
        )
    ):
        path = tmp_path / f"{number}.png"
        assert main([*words, "--output", str(path)]) == 0
        assert path.read_bytes().startswith(PNG)


def test_curves_and_points_are_the_numbers_of_the_files(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    losses, accuracies = draw_curves(list(runs.values())).axes
    assert [points(line) for line in losses.lines] == [[[1, 2.0], [2, 1.0]]] * 2
    assert points(accuracies.lines[0]) == [[1, 50.0], [2, 51.0]]
    assert [line.get_label() for line in losses.lines] == ["msa", "ecoformer"]
    both = draw_curves([runs["msa"], shutil.copytree(runs["msa"], tmp_path / "seed1" / "msa")])
    labels = [line.get_label() for line in both.axes[0].lines]
    assert labels == [f"{tmp_path.name}/msa", "seed1/msa"]
    table = tmp_path / "table.json"
    rows = [{"name": "a", "energy_pj": 5e9, "top1": 80.0}, {"name": "b", "energy_pj": 1e9}]
    table.write_text(json.dumps({"rows": rows}))
    (axes,) = draw_tradeoff([table]).axes
    assert [points(line) for line in axes.lines] == [[[5.0, 80.0]]]


@pytest.mark.parametrize(
    ("make_words", "expected"),
    [
        (lambda runs: ["curves", "/no/such/run"], "/no/such/run"),
        (lambda runs: ["tradeoff", "/no/such/table.json"], "/no/such/table.json"),
        (lambda runs: ["tradeoff", str(runs["msa"] / "config.yaml")], "is no table"),
        (lambda runs: ["cost", "--model", "pvt_v2_b00"], "did you mean 'pvt_v2_b0'"),
        (lambda runs: ["cost", "--resolutions", "16"], "32 pixels"),
        (lambda runs: ["energy", "--input-size", "16"], "--input-size start at 32 pixels"),
        (lambda runs: ["energy", "--node", "5nm"], "no published energy"),
        (
            lambda runs: ["codes", "--softmax", str(runs["msa"]), "--ecoformer", str(runs["msa"])],
            "no run with EcoFormer attention",
        ),
        (
            lambda runs: [
                *("codes", "--softmax", str(runs["ecoformer"])),
                *("--ecoformer", str(runs["ecoformer"])),
            ],
            "no run of the same model with softmax attention",
        ),
        (
            lambda runs: ["codes", "--softmax", "/no/run", "--ecoformer", str(runs["ecoformer"])],
            "/no/run is no run: it holds no config.yaml",
        ),
        (
            lambda runs: [
                *("codes", "--softmax", str(runs["msa"]), "--ecoformer"),
                *(str(runs["ecoformer"]), "--image", "360"),
            ],
            "there are 360 validation images",
        ),
    ],
)
def test_bad_input(
    make_words: Callable[[dict[str, Path]], list[str]],
    expected: str,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "pictures" / "x.png"
    assert main([*make_words(runs), "--output", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not path.exists()


def test_points_of_energy_are_those_of_the_table() -> None:
    prices = find_prices("7nm", "float16")
    (axes,) = draw_energy("pvt_v2_b0", [64], prices).axes
    rows, _ = describe_energy(["pvt_v2_b0"], input_sizes=[64], batch_size=1, prices=prices)
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["softmax", "EcoFormer"]
    paper, executed, fused, with_maps = ([x for x, _ in points(line)] for line in axes.lines)
    assert paper == [float(row["energy_pj"] or 0) / 1e9 for row in rows]
    assert executed == pytest.approx([0.5 * float(row["executed"] or 0) / 1e9 for row in rows])
    assert fused == [250 * float(row["traffic_bytes"] or 0) / 8e9 for row in rows]
    assert with_maps[0] > fused[0]


def test_a_run_without_an_epoch_has_no_curve(tmp_path: Path) -> None:
    (tmp_path / "log.txt").touch()
    with pytest.raises(InputError, match="has finished no epoch yet"):
        draw_curves([tmp_path])


@pytest.mark.parametrize(("key", "title"), [("test_AP", "AP %"), ("test_mine", "test_mine")])
def test_a_curve_is_of_what_the_task_measures(key: str, title: str, tmp_path: Path) -> None:
    record = {"epoch": 0, "train_loss": 2.0, "test_loss": 1.0, key: 37.2, "test_AP50": 57.2}
    (tmp_path / "log.txt").write_text(json.dumps(record))
    _, measures = draw_curves([tmp_path]).axes
    assert points(measures.lines[0]) == [[1, 37.2]] and measures.get_ylabel() == title


def test_curves_of_different_tasks_share_no_axis(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 1.5, "test_mIoU": 37.2}\n')
    with pytest.raises(InputError, match=r"msa is measured by test_acc1, and .* by test_mIoU"):
        draw_curves([runs["msa"], tmp_path])


def test_codes_are_drawn_on_images_with_one_label(runs: dict[str, Path]) -> None:
    with (runs["ecoformer"] / "config.yaml").open("a") as file:
        file.write("task: segmentation\nshort_side: 64\n")
    text = (runs["ecoformer"] / "config.yaml").read_text().replace("DIGITS", "SCENES")
    (runs["ecoformer"] / "config.yaml").write_text(text.replace("input_size: 32\n", ""))
    with pytest.raises(InputError, match="ecoformer is a run on SCENES, and codes are drawn on"):
        Pair.of(load_run(runs["msa"]), load_run(runs["ecoformer"]))


def test_only_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["method", "--output", str(tmp_path / "x.jpg")]) == 2
    assert "name it x.png" in capsys.readouterr().err
