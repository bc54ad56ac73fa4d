"""Zoo names on the command line of the mains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pvt
import twins
from ecoformer import export_released
from ecoformer.checkpoint import save_atomic
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import ModelFamily
from pvt.main import main as pvt_main
from tests.engine.conftest import image_folder
from twins.main import main as twins_main

__all__ = ["image_folder"]

MAINS = {"pvt": pvt_main, "twins": twins_main}


@pytest.mark.parametrize(
    ("family", "name", "file", "variant"),
    [
        (pvt.FAMILY, "ecoformer_pvt_v2_b0", "pvtv2_b0_ecoformer.pth", "pvt_v2_b0"),
        (twins.FAMILY, "ecoformer_twins_svt_small", "twins_svt_s_ecoformer.pth", "alt_gvt_small"),
    ],
)
def test_resume_takes_a_zoo_name(
    family: ModelFamily,
    name: str,
    file: str,
    variant: str,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = with_random_hash_functions(family.create_model(variant, num_classes=2))
    save_atomic(export_released(model), tmp_path / "checkpoints" / file)
    command = [
        *("--model", variant, "--attn_type", "ecoformer", "--data-path", str(image_folder)),
        *("--input-size", "32", "--batch-size", "8", "--num_workers", "0", "--device", "cpu"),
        *("--eval", "--resume"),
    ]
    main = MAINS[family.name]
    assert main([*command, name]) == 0
    assert "of 21)" in capsys.readouterr().out

    assert main([*command, f"{name}s"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"did you mean '{name}'" in line
