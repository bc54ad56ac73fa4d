"""Models as they are deployed, timed beside timm's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecoformer.tools.benchmark.command import main


@pytest.mark.slow
def test_each_way_to_deploy_is_timed_beside_timm(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "deploy.json"
    words = ["deploy", "--resolutions", "32", "--batch-size", "1", "--rounds", "1"]
    assert main([*words, "--json", str(file)]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    ways = ("eager", "compiled", "AOTInductor", "ONNX Runtime")
    assert list(rows) == [f"{name}, {way}" for way in ways for name in ("ecoformer", "timm")]
    assert rows["timm, compiled"]["ratio"] == 1
    assert all(row["side"] == 32 for row in rows.values())
    assert all(0 < row["low_ms"] <= row["median_ms"] for row in rows.values())
