"""A package of AOTInductor runs in C++, without Python and without an operator of ours."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import cpp_extension

import ecoformer
from tests.deploy.test_exporting import make_tiny, require_tools
from tests.tiny import draw_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled ``run_package.cpp``."""
    require_tools(".aoti.pt2")
    from torch._inductor.cpp_builder import get_cpp_compiler

    file = tmp_path_factory.mktemp("program") / "run_package"
    headers = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    libraries = cpp_extension.library_paths()
    command = [
        *(get_cpp_compiler(), "-std=c++20", "-O1", *headers),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(str(Path(__file__).with_name("run_package.cpp")), "-o", str(file)),
        *(word for folder in libraries for word in (f"-L{folder}", f"-Wl,-rpath,{folder}")),
        # The package asks for the first, and the program does not.
        *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return file


def test_a_package_gives_the_models_logits_in_cpp(program: Path, tmp_path: Path) -> None:
    model = make_tiny().eval()
    package = tmp_path / "tiny.aoti.pt2"
    ecoformer.export(model, draw_images(), package)
    for images in (draw_images(), draw_images(3, 21, 37)):
        images.numpy().tofile(tmp_path / "in")
        words = [program, package, tmp_path / "in", tmp_path / "out", *images.shape]
        # It finds nothing of Python's in its environment.
        subprocess.run(list(map(str, words)), check=True, env={})
        with torch.no_grad():
            expected = model(images)
        out = torch.from_numpy(np.fromfile(tmp_path / "out", np.float32)).view_as(expected)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
