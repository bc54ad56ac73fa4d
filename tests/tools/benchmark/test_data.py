"""The way of images to batches, timed beside timm's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ecoformer.errors import InputError
from ecoformer.tools.benchmark.command import main
from ecoformer.tools.benchmark.data import _gather
from tests.data.images import write_images

WORDS = ["data", "--images", "4", "--batch-size", "2", "--rounds", "1", "--resolutions", "40"]


def test_loaders_are_timed_whole_and_in_parts(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    assert main([*WORDS, "--json", str(file)]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert {"ecoformer", "timm", "timm, with prefetcher"} <= rows.keys()
    assert rows["timm"]["ratio"] == 1
    for row in rows.values():
        parts = [row[f"{part}_s"] for part in ("decode", "transform", "collate")]
        assert min(parts) > 0
        assert 1 / row["per_core"] == pytest.approx(sum(parts) + row["rest_s"])


def test_images_of_a_folder_are_drawn(tmp_path: Path) -> None:
    folder = write_images(tmp_path, 9, 2) / "train"
    with _gather(folder, 6) as root:
        chosen = [file.resolve() for file in root.glob("*/*")]
        assert len(set(chosen)) == 6
        assert {file.parents[1] for file in chosen} == {folder}
    # A folder with fewer gives some again.
    with _gather(folder, 12) as root:
        chosen = [file.resolve() for file in root.glob("*/*")]
        assert (len(chosen), len(set(chosen))) == (12, 9)


def test_generated_images_have_the_size_of_photographs(tmp_path: Path) -> None:
    with _gather(None, 2) as root:
        files = sorted(root.glob("*/*"))
        assert {Image.open(file).size for file in files} == {(500, 375)}
        # ImageNet's mean file has 108 kB.
        assert all(90e3 < file.stat().st_size < 130e3 for file in files)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data", "--images", "4"], "--images 4 make no batch of 64"),
        (["data", "--data-path", "."], "has no folder train/"),
    ],
)
def test_what_cannot_be_read_is_refused(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == InputError.exit_code
    assert expected in capsys.readouterr().err
