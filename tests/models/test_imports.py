"""What importing a backbone brings along, and how its models come to timm in any order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CREATE = (
    "import timm\n"
    "for name in ('ecoformer_pvt_v2_b0', 'ecoformer_twins_svt_small'):\n"
    "    assert timm.is_model(name), name\n"
    "assert timm.create_model('ecoformer_pvt_v2_b0', num_classes=2).num_classes == 2\n"
    "assert 'ecoformer_pvt_v2_b0' in timm.list_models(module='ecoformer_pvt', pretrained=True)\n"
)


def run_python(code: str, *path: Path) -> None:
    search = [str(ROOT), *map(str, path)]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {search!r}\n{code}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_names_need_neither_torch_nor_timm() -> None:
    # An import of what is None fails.
    run_python(
        "sys.modules.update(torch=None, timm=None)\n"
        "import pvt, twins\n"
        "from ecoformer.errors import InputError\n"
        "from ecoformer.models.registry import find_family\n"
        "assert find_family('alt_gvt_small_ecoformer') is twins.FAMILY\n"
        "assert pvt.FAMILY.resolve('pvt_v2_b0') == ('pvt_v2_b0', 'ecoformer')\n"
        "for refused in (('pvt_v2_b9',), ('pvt_v2_b0', 'lsa_gsa')):\n"
        "    try:\n"
        "        pvt.create_model(*refused)\n"
        "    except InputError:\n"
        "        continue\n"
        "    raise AssertionError(refused)\n"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import pvt, timm, twins",  # one before timm, one after
        "import twins, pvt.model",  # timm is imported by a model of ours
        "import pvt, twins, borrower",  # and by somebody else
    ],
)
def test_timm_knows_the_models_in_every_order_of_imports(imports: str, tmp_path: Path) -> None:
    (tmp_path / "borrower.py").write_text("from timm.layers import DropPath\n")
    run_python(f"{imports}\n{CREATE}", tmp_path)
