from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecoformer.tools.benchmark.command import main


@pytest.mark.slow
def test_one_thread_is_timed_against_all(tmp_path: Path) -> None:
    file = tmp_path / "threads.json"
    words = ["threads", "--resolutions", "32", "--batch-size", "2", "--rounds", "1"]
    assert main([*words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 6
    assert {row["jobs"] > 0 for row in rows} == {False, True}
    assert all(row["one_s"] > 0 and row["ratio"] > 0 for row in rows)
