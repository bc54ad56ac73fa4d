"""The page about runs: what it holds, that it stands alone, and that a browser shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import pvt
from ecoformer import count_cost
from ecoformer.config import make_config, to_yaml
from ecoformer.engine.run import train
from ecoformer.engine.session import create_model, create_task
from ecoformer.errors import InputError
from ecoformer.hashing import with_random_hash_functions
from ecoformer.tools.figures import make_figure
from ecoformer.tools.plots.codes import Pair
from ecoformer.tools.report import command, content
from ecoformer.tools.report.content import read_groups, write_sections
from ecoformer.tools.report.page import Section, format_page
from ecoformer.tools.table import Column
from tests.tasks.test_sequence import configure
from tests.tasks.tiny_pyramid import shrink
from tests.tools.report.browser import Page, find_browser, open_browser
from tests.tools.report.runs import write_run

HTML = "{http://www.w3.org/1999/xhtml}"
# Curves, trade-off, cost, and codes of two images.
NUM_FIGURES = 5


@pytest.fixture(autouse=True)
def few_resolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_RESOLUTIONS", (32, 64))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "a & b", "ecoformer"), write_run(folder / "softmax", "msa")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "_RESOLUTIONS", (32, 64))
        path = folder / "report.html"
        words = [*map(str, runs), "--output", str(path), "--images", "0", "7"]
        assert command.main(words) == 0
    return path


def parse(page: Path) -> ElementTree.Element:
    text = page.read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def test_it_is_one_small_well_formed_file(page: Path) -> None:
    assert page.stat().st_size < 1_000_000
    root = parse(page)
    assert len(list(root.iter(f"{HTML}figure"))) == NUM_FIGURES
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    for figure in root.iter(f"{HTML}figure"):
        assert "".join(figure.itertext()).strip()
        svg = "{http://www.w3.org/2000/svg}"
        assert list(figure.iter(f"{svg}path")) or list(figure.iter(f"{svg}image"))


def test_it_needs_nothing_from_elsewhere(page: Path) -> None:
    root = parse(page)
    ids = {f"#{element.get('id')}" for element in root.iter()}
    targets = [
        value
        for element in root.iter()
        for name, value in element.attrib.items()
        if name.rpartition("}")[2] in ("href", "src", "srcset", "action", "data")
    ]
    targets += re.findall(r"url\(['\"]?([^)'\"]*)", page.read_text("utf-8"))
    assert targets
    for target in targets:
        assert target in ids or target.startswith("data:"), target
    assert not list(root.iter(f"{HTML}script"))
    assert "@import" not in page.read_text("utf-8")


def read_table(page: Path) -> list[dict[str, str]]:
    head, *body = (
        ["".join(cell.itertext()) for cell in row] for row in parse(page).iter(f"{HTML}tr")
    )
    return [dict(zip(head, cells, strict=True)) for cells in body]


def test_the_table_tells_what_the_runs_are(page: Path) -> None:
    softmax, ours = read_table(page)
    assert (softmax["attention"], ours["attention"]) == ("softmax", "EcoFormer")
    assert (ours["run"], ours["top-1 %"], ours["vs first row"]) == ("a & b", "80.00", "0.00")
    cost = count_cost(pvt.create_model("pvt_v2_b0", "ecoformer", num_classes=10), 32)
    assert ours["energy uJ"] == f"{cost.energy_pj / 1e6:.2f}"
    assert ours["moved MB"] == f"{cost.traffic_bytes() / 1e6:.1f}"


def test_seeds_are_taken_together(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"seed{seed}" / kind, kind, seed, last)
        for kind, results in (("ecoformer", (82.0, 85.0)), ("msa", (81.0, 83.0)))
        for seed, last in enumerate(results)
    ]
    table = next(write_sections(runs, [])).table
    assert table is not None
    softmax, ours = table[1]
    assert (softmax["top1"], softmax["num_seeds"]) == (82, 2)
    assert (ours["top1"], ours["difference"]) == (83.5, 1.5)
    assert ours["difference_ci95"] == pytest.approx(12.706204736 * 0.5)


def test_images_are_spread_evenly_unless_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draw(pair: Pair, *, index: int) -> Figure:
        drawn.append(index)
        return make_figure()[0]

    monkeypatch.setattr(content, "draw_codes", draw)
    runs = [write_run(tmp_path / kind, kind) for kind in ("msa", "ecoformer")]
    assert len(content._write_codes(read_groups(runs), None).pictures) == 3
    assert drawn == [60, 180, 300]


def test_settings_set_runs_apart(tmp_path: Path) -> None:
    plain, short = (write_run(tmp_path / name, "ecoformer") for name in ("plain", "short"))
    with (short / "config.yaml").open("a") as file:
        file.write("\nnum_bits: 8\n")
    assert [group.name for group in read_groups([plain, short])] == ["plain", "short"]


@pytest.mark.parametrize(
    ("field", "values", "is_one"),
    [
        ("teacher", ("seed0/msa.pth", "seed1/msa.pth"), True),
        ("finetune", ("seed0/msa.pth", "null"), False),
        ("checkpoint_every", ("5", "10"), True),
        ("data_path", ("here", "there"), False),
    ],
)
def test_where_things_lie_sets_no_seeds_apart(
    field: str, values: tuple[str, str], is_one: bool, tmp_path: Path
) -> None:
    runs = [write_run(tmp_path / f"seed{seed}", "ecoformer", seed) for seed in range(2)]
    for run, value in zip(runs, values, strict=True):
        with (run / "config.yaml").open("a") as file:
            file.write(f"\n{field}: {value}\n")
            if field == "teacher":
                file.write("distill: logits\n")
    assert len(read_groups(runs)) == (1 if is_one else 2)


def test_the_same_run_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "msa")
    with pytest.raises(InputError, match="the same settings and seed"):
        read_groups([run, run])


def test_detectors_are_compared_by_their_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By AP, at what they cost as a whole on images of their size."""
    shrink(monkeypatch)
    runs = []
    for kind in ("msa", "ecoformer"):
        folder = tmp_path / kind
        folder.mkdir()
        words = {"task": "detection", "model": "pvt_v2_b0", "attn_type": kind, "data_set": "SCENES"}
        config = make_config(**words, short_side=64, device="cpu", num_workers=0)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "log.txt").write_text('{"epoch": 0, "train_loss": 1.5, "test_AP": 37.2}\n')
        model = create_model(config, create_task(config))
        model.head.classification_head.cls_logits = nn.Conv2d(16, 90, 3, padding=1)  # type: ignore
        torch.save(with_random_hash_functions(model).state_dict(), folder / "last_checkpoint.pth")
        runs.append(folder)
    table, training, *_, codes = write_sections(runs, [0])
    assert table.table is not None
    columns, (softmax, ours) = table.table
    assert {"AP %", "px"} <= {column.title for column in columns}
    assert (ours["top1"], ours["input_size"], ours["data"]) == (37.2, 64, "SCENES")
    # The heads, which are alike, are most of it.
    assert float(str(softmax["parameters"])) > 3e6
    assert "Training loss and AP" in training.pictures[0].caption
    assert "codes are drawn on images with one label" in codes.notes[0]


def test_a_run_on_sequences_is_refused(tmp_path: Path) -> None:
    fields = {"epochs": 1, "epoch_samples": 16, "attn_type": "msa"}
    train(configure(tmp_path / "pixels", **fields))
    with pytest.raises(InputError, match=r"pixels is a run on tokens, .*; leave it out"):
        read_groups([tmp_path / "pixels"])


def test_without_a_softmax_run_codes_are_asked_for(tmp_path: Path) -> None:
    *_, codes = write_sections([write_run(tmp_path / "run", "ecoformer")], [0])
    assert not codes.pictures
    assert "a run with softmax" in codes.notes[0]


def test_models_for_one_size_have_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(variant: str, sides: object) -> Figure:
        raise InputError("images of 224 px alone; give those.")

    monkeypatch.setattr(content, "draw_cost", refuse)
    section = content._write_costs(read_groups([write_run(tmp_path / "run", "msa")]))
    assert not section.pictures
    assert section.notes == ["No curve of pvt_v2_b0: images of 224 px alone; give those."]


def refuse(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert command.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "pages" / "x.html"
    assert "give a run's folder" in refuse(capsys, tmp_path / "none", "--output", page)
    other = write_run(tmp_path / "other", "msa", train_loss=1.0)
    assert "was never measured" in refuse(capsys, other, "--output", page)
    runs = [write_run(tmp_path / kind, kind) for kind in ("msa", "ecoformer")]
    words = [*runs, "--output", page, "--images", 360]
    assert "there are 360 validation images" in refuse(capsys, *words)
    assert not page.parent.exists()


def test_a_page_that_grew_too_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_write_page", lambda *_: "x" * 1_000_000)
    assert "less than 1 MB" in refuse(capsys, "run", "--output", tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_words_of_users_are_escaped() -> None:
    table = ((Column("name", "<b>"),), [{"name": "<script>&"}])
    text = format_page("a < b", [Section("&", table=table, notes=["</p>"])])
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert [cell.text for cell in root.iter(f"{HTML}td")] == ["<script>&"]


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    binary = find_browser()
    if binary is None:
        pytest.skip("no Chromium here (Debian, Ubuntu: apt install chromium)")
    with open_browser(binary, tmp_path_factory.mktemp("profile")) as opened:
        opened.open(page)
        yield opened


BOXES = """[...document.querySelectorAll('figure svg')].map(svg => {
  const {x, y, width, height} = svg.getBoundingClientRect();
  return {x: x + scrollX, y: y + scrollY, width, height};
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_figure(scheme: str, browser: Page, page: Path) -> None:
    browser.call(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-color-scheme", "value": scheme}],
    )
    boxes = browser.evaluate(BOXES)
    assert len(boxes) == NUM_FIGURES
    background = (246, 247, 249) if scheme == "light" else (29, 32, 36)
    for box in boxes:
        assert box["width"] > 300 and box["height"] > 100
        colors = browser.photograph(box).convert("RGB").getcolors(2**24)
        assert colors is not None and len(colors) > 50
        # What is drawn is drawn on the page's own ground.
        assert max(colors)[1] == background
    ink = browser.evaluate("getComputedStyle(document.body).color")
    fills = "[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)"
    assert set(browser.evaluate(fills)) == {ink}


def test_a_browser_loads_the_file_alone_and_complains_of_nothing(browser: Page, page: Path) -> None:
    assert browser.evaluate("document.title") == "EcoFormer, a report of runs"
    assert browser.addresses == {page.as_uri()}
    assert browser.complaints == []
