"""The C++ kernels: against the reference on every instruction set, and how they are compiled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecoformer import InputError
from ecoformer.ops import encode, kernelized_hash_attention, normalize_rows, reference, use_backend
from ecoformer.ops.backends import HashFunctions, find_backend, find_fused_backend
from ecoformer.ops.backends.native import library
from tests.problems import Problem, draw, draw_alike_problem, draw_problem, solve

ROOT = Path(__file__).parents[2]
BUILT = library.library_path()

needs_library = pytest.mark.skipif(bool(library.load()), reason=library.load())
VALUE_BIASES = ["released", "normalized"]
# N is odd, one, or past a chunk; K fills a digit, a word, or neither; D fills a vector or not.
SHAPES: dict[str, dict[str, Any]] = {
    "odd": {"tokens": 37, "dim": 8, "bits": 5, "anchors": 7},
    "one token": {"images": 1, "tokens": 1, "dim": 16, "bits": 16, "anchors": 16},
    "one of all": {"tokens": 3, "dim": 1, "bits": 1, "anchors": 1},
    "published": {"heads": 1, "tokens": 196, "dim": 32, "bits": 16, "anchors": 25},
    "chunks": {"images": 1, "tokens": 1031, "dim": 3, "bits": 2, "anchors": 3},
    "two words": {"tokens": 129, "dim": 64, "bits": 33, "anchors": 25},
    "largest": {"images": 1, "heads": 1, "tokens": 65, "dim": 128, "bits": 64, "anchors": 64},
}
# Rounding of 16 bits.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Of all values together; of one token the true gradient is 0."""
    return float((value.double() - expected).norm() / expected.norm().clamp_min(0.1))


def attend(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    with use_backend("native"):
        return solve(kernelized_hash_attention, problem, **options)


def check_against_reference(problem: Problem, value_bias: str, **options: Any) -> None:
    options["value_bias"] = value_bias
    expected = solve(reference.kernelized_hash_attention, problem.upcast(), **options)
    for found, truth in zip(attend(problem, **options), expected, strict=True):
        assert found.dtype == problem.q.dtype
        assert relative_error(found, truth) < TOLERANCES[problem.q.dtype]


@needs_library
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value_bias", VALUE_BIASES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_output_and_gradients_equal_the_reference(
    shape: str, value_bias: str, dtype: torch.dtype
) -> None:
    check_against_reference(draw_problem(**SHAPES[shape], dtype=dtype), value_bias)


@needs_library
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_narrower_vectors_equal_the_reference(capability: str) -> None:
    """In a process of its own: vectors are chosen once."""
    code = (
        "import torch\n"
        "from tests.ops.test_native import *\n"
        f"assert torch.ops.ecoformer_native.vectors() in ({capability!r}, 'default')\n"
        "for shape in SHAPES.values():\n"
        "    for dtype in TOLERANCES:\n"
        "        check_against_reference(draw_problem(**shape, dtype=dtype), 'released')\n"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=120)


@needs_library
def test_rows_may_have_any_strides_and_types() -> None:
    problem = draw_problem(tokens=70, dim=32, dtype=torch.float32)
    expected = attend(problem)
    turned = Problem(
        problem.q.mT.contiguous().mT,
        problem.v.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        problem.functions,
        problem.grad,
    )
    for found, truth in zip(attend(turned), expected, strict=True):
        assert torch.equal(found, truth)
    mixed = Problem(problem.q, problem.v.bfloat16(), problem.functions, problem.grad.bfloat16())
    results = attend(mixed)
    assert [x.dtype for x in results] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert relative_error(results[1], expected[1].double()) < 1e-2
    constant = Problem(problem.q, problem.v, problem.functions, torch.ones(()).expand_as(problem.v))
    check_against_reference(constant, "released")


@needs_library
@pytest.mark.parametrize("bits", [16, 64])
def test_codes_are_those_of_float64(bits: int) -> None:
    """Sums of codes are whole numbers: they differ where a single code does."""
    problem = draw_problem(images=4, tokens=3136, dim=32, bits=bits, anchors=25).upcast()
    functions = HashFunctions(**problem.functions)
    codes = encode(normalize_rows(problem.q), **problem.functions)
    native = find_backend("native")
    q, v = problem.q.float(), problem.v.float()
    fused = find_fused_backend("native", q, v, functions)
    assert fused is native
    _, sums, _ = fused.forward(q, v, functions.to(torch.float32), is_normalized=False)
    # Of 1.6 million codes, a tie.
    differences = (sums[..., :-1, -1].double() - codes.sum(-2)).abs() / 2
    assert differences.sum() <= codes.numel() * 1e-6


@needs_library
@pytest.mark.parametrize("images", [1, 3, 4])
def test_threads_change_no_bit(images: int) -> None:
    problem = draw_problem(images=images, heads=1, tokens=2500, dim=32, dtype=torch.float32)
    mask = draw(images, 2500) > 0
    before = torch.get_num_threads()
    try:
        for options in ({}, {"key_mask": mask}):
            results = []
            for num_threads in (1, 2, 3, 2):
                torch.set_num_threads(num_threads)
                results.append(attend(problem, **options))
            for other in results[1:]:
                assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@needs_library
def test_masked_tokens_are_as_if_they_were_not_there() -> None:
    problem = draw_problem(images=1, tokens=300, dim=32, dtype=torch.float32)
    real = draw(300, seed=3) > 0.5
    q, v, grad = (x[:, :, real] for x in (problem.q, problem.v, problem.grad))
    alone = Problem(q, v, problem.functions, grad)
    for x in (problem.q, problem.v, problem.grad):
        x[:, :, ~real] = float("nan")
    for value_bias in VALUE_BIASES:
        found = attend(problem, value_bias=value_bias, key_mask=real[None])
        expected = attend(alone, value_bias=value_bias)
        for tensor, truth in zip(found, expected, strict=True):
            assert torch.equal(tensor[:, :, real], truth)
            assert not tensor[:, :, ~real].any()
    none = attend(problem, key_mask=torch.zeros(1, 300, dtype=torch.bool))
    assert not any(tensor.any() for tensor in none)


@needs_library
def test_masks_hold_for_rows_that_are_alike() -> None:
    problem = draw_alike_problem(1e-6, dtype=torch.float32)
    mask = torch.arange(40).expand(2, 40) % 3 != 0
    expected = solve(reference.kernelized_hash_attention, problem, key_mask=mask)
    for tensor, truth in zip(attend(problem, key_mask=mask), expected, strict=True):
        assert (tensor - truth).norm() <= 2e-5 * truth.norm()


@needs_library
@pytest.mark.parametrize("name", ["anchors", "weight", "kernel_mean", "q"])
def test_no_number_in_gives_no_number_out(name: str) -> None:
    problem = draw_problem(dtype=torch.float32)
    place = problem.q if name == "q" else problem.functions[name]
    place[(0,) * place.ndim] = float("nan")
    with use_backend("native"):
        out = kernelized_hash_attention(problem.q, problem.v, **problem.functions)
    assert out[0, 0].isnan().all() and out[1, 1].isfinite().all()


@needs_library
@pytest.mark.parametrize(
    "size",
    [{"dim": 129}, {"bits": 65}, {"bits": 0}, {"dtype": torch.float64}],
    ids=["D", "K", "no K", "dtype"],
)
def test_what_kernels_do_not_take_goes_elsewhere(size: dict[str, Any]) -> None:
    problem = draw_problem(**{"dtype": torch.float32} | size)
    functions = HashFunctions(**problem.functions)
    assert find_fused_backend("", problem.q, problem.v, functions).name == "blocked"
    with pytest.raises(InputError, match="'native' cannot run on cpu"):
        attend(problem)


@needs_library
def test_it_is_what_a_cpu_runs() -> None:
    problem = draw_problem(dtype=torch.bfloat16)
    functions = HashFunctions(**problem.functions)
    assert find_fused_backend("", problem.q, problem.v, functions).name == "native"


@needs_library
@pytest.mark.slow
def test_a_package_runs_where_only_the_library_is(tmp_path: Path) -> None:
    """AOTInductor calls the operator without Python: what C++ loads does the same."""

    class Layer(torch.nn.Module):
        anchors: Tensor
        weight: Tensor
        kernel_mean: Tensor

        def __init__(self, functions: dict[str, Tensor]) -> None:
            super().__init__()
            for name, tensor in functions.items():
                self.register_buffer(name, tensor)

        def forward(self, q: Tensor, v: Tensor) -> Tensor:
            return 2 * kernelized_hash_attention(
                q, v, anchors=self.anchors, weight=self.weight, kernel_mean=self.kernel_mean
            )

    problem = draw_problem(tokens=49, dtype=torch.float32)
    layer = Layer(problem.functions)
    tokens = torch.export.Dim("tokens", min=2)
    with use_backend("native"):
        exported = torch.export.export(
            layer, (problem.q, problem.v), dynamic_shapes=({2: tokens}, {2: tokens})
        )
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "layer.pt2")
    )
    smaller = problem.q[:, :, :20], problem.v[:, :, :20]
    torch.save((smaller, layer(*smaller)), tmp_path / "data.pt")
    code = (
        "import sys, torch\n"
        f"torch.ops.load_library({str(BUILT)!r})\n"
        f"layer = torch._inductor.aoti_load_package({package!r})\n"
        f"inputs, expected = torch.load({str(tmp_path / 'data.pt')!r}, weights_only=True)\n"
        "torch.testing.assert_close(layer(*inputs), expected)\n"
        "assert 'ecoformer' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has not looked for the library."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_reason", None)
    yield tmp_path / "cache" / "ecoformer"


def install_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Put a script in the compiler's place; it counts its calls in the file returned."""
    compiler, calls = folder / "compiler", folder / "calls"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{script}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return calls


# Writes its last argument, as compilers are called here.
PRETEND = f'for last; do :; done; cat {BUILT} > "$last"'


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "there is no C++ compiler (/nowhere/c++); install g++, or set CXX"),
        ("echo 'kernels.h:1: error: boom' >&2; exit 1", "fails (kernels.h:1: error: boom)"),
        (PRETEND + "; exit 3", "fails (no output)"),
    ],
    ids=["none", "broken", "broken at the end"],
)
def test_without_a_compiler_it_says_so_once_and_goes_on(
    script: str | None,
    words: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    if script:
        install_compiler(tmp_path, monkeypatch, script)
    problem = draw_problem(dtype=torch.float32)
    with caplog.at_level("INFO", "ecoformer"):
        for _ in range(2):
            found = solve(kernelized_hash_attention, problem)
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "INFO"]
    assert words in line and "\n" not in line
    assert not list(cache.glob("*.so")) and not list(cache.glob("building-*"))
    with use_backend("blocked"):
        expected = solve(kernelized_hash_attention, problem)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with pytest.raises(InputError, match="'native' cannot run here"):
        attend(problem)


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(library, "_reason", None)
    assert "their cache cannot be written" in library.load()
    assert "set TORCH_EXTENSIONS_DIR" in library.load()


def test_the_environment_can_leave_it_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ECOFORMER_NATIVE", "0")
    with caplog.at_level("INFO", "ecoformer"):
        assert library.load() == "ECOFORMER_NATIVE=0 leaves them out"
    assert not caplog.records and not cache.exists()


@needs_library
@pytest.mark.parametrize("is_replaced", [False, True])
def test_many_at_once_compile_once(
    is_replaced: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install_compiler(tmp_path, monkeypatch, "sleep 0.2\n" + PRETEND)
    path = library.library_path()
    if is_replaced:
        cache.mkdir(parents=True)
        path.write_bytes(b"damaged")
        os.utime(path, (0, 0))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(library._build, is_replaced=is_replaced), [path] * 4))
    num_sources = len(list(library._SOURCES.glob("*.cpp")))
    assert len(calls.read_text().splitlines()) == num_sources + 1
    assert path.read_bytes() == BUILT.read_bytes()


def test_many_at_once_fail_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install_compiler(tmp_path, monkeypatch, "sleep 0.2; exit 1")

    def build(_: int) -> str:
        with pytest.raises(library._BuildError) as raised:
            library._build(library.library_path())
        return str(raised.value)

    with ThreadPoolExecutor(4) as pool:
        (reason,) = set(pool.map(build, range(4)))
    assert "fails" in reason
    num_sources = len(list(library._SOURCES.glob("*.cpp")))
    assert len(calls.read_text().splitlines()) == num_sources
    # Whoever comes later, with a compiler that works, is not told of it.
    time.sleep(0.01)
    install_compiler(tmp_path, monkeypatch, PRETEND if BUILT.exists() else "exit 1")
    if BUILT.exists():
        library._build(library.library_path())
        assert library.library_path().exists()


@needs_library
def test_a_killed_build_leaves_nothing_that_is_taken_for_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install_compiler(tmp_path, monkeypatch, PRETEND + "; sleep 60")
    code = "from ecoformer.ops.backends.native import library; library.load()"
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    while not calls.exists():
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list(cache.glob("*.so"))
    others = cache / "building-native-of-another-pytorch"
    others.mkdir()
    install_compiler(tmp_path, monkeypatch, PRETEND)
    library._build(library.library_path())
    assert library.library_path().exists()
    # What the killed one had begun is gone, too, and what another process may be making is not.
    assert list(cache.glob("building-*")) == [others]


@needs_library
def test_a_damaged_library_is_built_anew(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []

    def load(path: Path) -> None:
        # In place of PyTorch's, which takes operators of one name once in a process.
        loaded.append(path.stat().st_size)
        if loaded[-1] == 1000:
            raise OSError(f"Could not load this library: {path}")

    monkeypatch.setattr(torch.ops, "load_library", load)
    monkeypatch.setattr(library, "_register", lambda: None)
    install_compiler(tmp_path, monkeypatch, PRETEND)
    cache.mkdir(parents=True)
    library.library_path().write_bytes(BUILT.read_bytes()[:1000])
    assert library.load() == ""
    assert loaded == [1000, BUILT.stat().st_size]


def test_ranks_take_it_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_reason", "")
    monkeypatch.setattr(library, "gather_objects", lambda mine: [mine, "no g++ there"])
    library.agree()
    assert "another rank cannot load them (no g++ there)" in library.load()


def test_the_cache_depends_on_sources_and_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {library.library_path()}
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    paths.add(library.library_path())
    source = tmp_path / "operator.cpp"
    source.write_text("int other;")
    monkeypatch.setattr(library, "_SOURCES", tmp_path)
    paths.add(library.library_path())
    assert len(paths) == 3
