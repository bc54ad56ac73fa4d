from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from ecoformer.__main__ import main


@pytest.mark.slow
def test_threads_beside_busy_cores_do_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R20, without a stopwatch: threads that spin without limit took 44 times as long as one."""
    file = tmp_path / "threads.json"
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    words = ["threads", "--resolutions", "32", "--batch-size", "2", "--rounds", "1"]
    try:
        assert main(["benchmark", *words, "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(before)
        os.environ.pop("GOMP_SPINCOUNT", None)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 8
    assert {row["jobs"] > 0 for row in rows} == {False, True}
    assert all(row["one_s"] > 0 and 0 < row["ratio"] < 10 for row in rows)
