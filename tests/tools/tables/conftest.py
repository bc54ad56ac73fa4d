"""The engine's tiny images, and how the command refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ecoformer.tools.tables.command import main
from tests.engine.conftest import image_folder

__all__ = ["image_folder", "refuse"]

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run the command, and return the one line that refuses it; nothing may be written."""

    def run(*words: str) -> str:
        capsys.readouterr()
        folder = tmp_path / "refused"
        assert main([*words, "--output-dir", str(folder)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert not [file for file in folder.rglob("*") if file.is_file()]
        return lines[0]

    return run
