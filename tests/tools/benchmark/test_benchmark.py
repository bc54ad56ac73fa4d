"""The benchmark: right arithmetic, and every task runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pvt
from ecoformer.errors import InputError
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import find_family
from ecoformer.ops import kernelized_hash_attention
from ecoformer.ops.backends.triton import TritonBackend
from ecoformer.tools import measure
from ecoformer.tools.benchmark import (
    convolutions,
    cores,
    correctness,
    dense,
    fits,
    sequences,
    suite,
)
from ecoformer.tools.benchmark.command import main
from ecoformer.tools.benchmark.comparison import Comparison, Contender, Setup, compare
from ecoformer.tools.benchmark.correctness import check_core
from ecoformer.tools.benchmark.measurements import Measurement, Report
from ecoformer.tools.measure import Call, PeakMemory, Timing

CPU = torch.device("cpu")
CORE = cores.CoreInputs(4, 1024, CPU, torch.float32)


def make_row(name: str, num_tokens: int, ms: float, peak_bytes: int | None = None) -> Measurement:
    """A row of two images."""
    return Measurement("task", name, 2, num_tokens, Timing(ms, ms, ms, 1), peak_bytes)


def read_cells(text: str) -> list[list[str]]:
    """The cells of a table that follows a line and an empty one, head first."""
    head, _, *lines = text.splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]


def read_out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_report_compares_and_fits_slopes(tmp_path: Path) -> None:
    counts = (10, 100, 1000)
    rows = [make_row("linear", n, 0.5 * n, 64 * n) for n in counts]
    rows += [make_row("quadratic", n, 0.01 * n**2) for n in counts]
    # What did not run is in no curve.
    rows.append(Measurement("task", "quadratic", 2, 10_000, None, note="not run: slow"))
    report = Report({"command": "x"}, 1e9, rows)
    linear, quadratic = report.slopes()
    assert (linear.time, linear.memory) == pytest.approx((1, 1))
    assert quadratic.time == pytest.approx(2)
    assert quadratic.memory is None
    assert [line[-2:] for line in read_cells(report.describe_slopes())[1:]] == [
        ["1.000", "1.000"],
        ["2.000", ""],
    ]
    # At N = 1000: 10,000 ms against 500.
    heads, _, cells = read_cells(report.describe_comparison([rows[2], rows[5]]))
    line = dict(zip(heads, cells, strict=True))
    assert (line["contender"], line["ms"], line["x time"]) == ("quadratic", "1e+04", "20.00")
    assert "quartiles" not in line
    content = json.loads(report.to_json())
    assert content["rows"][0]["timing"]["median_ms"] == 5
    assert content["slopes"][1]["time"] == pytest.approx(2)
    report.draw(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_contender_that_did_not_run_has_no_figure() -> None:
    rows = [
        make_row("fast", 100, 1.0),
        Measurement("task", "slow", 2, 100, None, note="not run: slow"),
    ]
    for order in (rows, rows[::-1]):
        heads, *lines = read_cells(Report({}, 1e9).describe_comparison(order))
        (slow,) = [dict(zip(heads, cells, strict=True)) for cells in lines if cells[0] == "slow"]
        (fast,) = [dict(zip(heads, cells, strict=True)) for cells in lines if cells[0] == "fast"]
        assert [text for text in slow.values() if text] == ["slow", "not run: slow"]
        # With what did not run nothing can be compared.
        assert fast.get("x time") == ("1.00" if order is rows else None)
        assert (fast["ms"], fast["images/s"]) == ("1", "2000")


def test_bandwidth_is_a_share_of_the_copy() -> None:
    row = Measurement("task", "a", 1, 1, Timing(1, 1, 1, 1), None, 10**6, 2 * 10**6)
    heads, cells = read_cells(Report({}, 4e9).describe_comparison([row]))
    line = dict(zip(heads, cells, strict=True))
    assert line["GB/s of least bytes"] == "1.0"
    assert (line["% of copy"], line["% of copy by its passes"]) == ("25", "50")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Setup:
    """One round, and no memory: the process that measures it takes seconds to start."""
    monkeypatch.setattr(PeakMemory, "measure", lambda self, build, call=None: None)
    monkeypatch.setitem(measure._COPY_BYTES, "cpu", 2**20)
    return Setup(CPU, torch.float32, 1, PeakMemory(CPU))


def fail() -> Call:
    """Build nothing."""
    raise RuntimeError("no such kernel\nand a page about it")


def test_one_that_fails_does_not_stop_the_others(setup: Setup) -> None:
    contenders = [
        Contender("good", partial(partial, int)),
        Contender("bad", fail),
        Contender("late", partial(partial, fail)),
        Contender("large", fail, why_not="needs 900 GB"),
    ]
    comparison = Comparison(setup, "task", contenders, batch_size=1, num_tokens=1)
    ((good, *others),) = compare(comparison)
    assert good.timing is not None and good.timing.median_ms > 0
    assert [row.timing for row in others] == [None] * 3
    failure = "failed: RuntimeError: no such kernel"
    assert [row.note for row in others] == [failure, failure, "not run: needs 900 GB"]


def test_what_the_user_got_wrong_stops_the_benchmark(setup: Setup) -> None:
    def refuse() -> Call:
        raise InputError("no such model.")

    with pytest.raises(InputError, match="no such model"):
        Comparison(setup, "task", [Contender("bad", refuse)], batch_size=1, num_tokens=1)


def test_dense_fit_is_left_out_where_it_takes_minutes(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "NUM_STEPS", 2)
    ((shipped, dense),) = fits.measure_fit(setup, batch_size=2, num_tokens=32)
    assert shipped.timing is not None and dense.timing is not None
    monkeypatch.setitem(fits._MAX_PAIRS, "cpu", 2 * 32**2 - 1)
    ((shipped, dense),) = fits.measure_fit(setup, batch_size=2, num_tokens=32)
    assert shipped.timing is not None and dense.timing is None
    assert dense.note == "not run: takes minutes"


def test_a_slow_core_leaves_the_sweep(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_SWEEP_TOKENS", 256)
    monkeypatch.setattr(cores, "_SLOW_SECONDS", 0.0)
    kinds = ("ecoformer", "sdpa")
    sweep = cores.measure_attention_sweep(setup, token_counts=(64, 256), kinds=kinds)
    small, large = sweep
    assert all(row.timing for row in small)
    assert [row.timing for row in large] == [None, None]
    assert "slower than 0 s at N=64" in large[1].note
    assert [row.batch_size for row in (*small, *large)] == [4, 4, 1, 1]


@pytest.mark.parametrize("kind", ["ecoformer, eager halves", "reference"])
def test_cores_of_hashes_do_the_same_from_raw_rows(kind: str) -> None:
    inputs = replace(CORE, batch_size=2, num_tokens=64)
    for has_backward in (False, True):
        shipped, other = (
            cores.build_core(name, inputs, has_backward=has_backward)()
            for name in ("ecoformer", kind)
        )
        torch.testing.assert_close(other, shipped, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("side", "tokens"), [(224, 56**2), (225, 57**2), (32, 64)])
def test_tokens_are_those_of_the_first_stage(side: int, tokens: int) -> None:
    assert cores.count_tokens(side) == tokens
    stage = pvt.create_model("pvt_v2_b0", "msa").get_submodule("patch_embed1")
    assert stage(torch.zeros(1, 3, side, side))[0].shape[1] == tokens


def test_the_bytes_of_passes_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = replace(CORE, dtype=torch.bfloat16)
    # Rows of 64 bytes, 4096 of them; five passes and two of 4 bytes, then eight more passes.
    assert cores._pass_bytes(inputs, has_backward=False) == 4096 * (5 * 64 + 8)
    assert cores._pass_bytes(inputs, has_backward=True) == 4096 * (13 * 64 + 8)
    # Without kernels nobody knows: what fits into caches is not moved.
    for runs, expected in ((False, None), (True, 4096 * (5 * 64 + 8))):
        monkeypatch.setattr(TritonBackend, "can_run", lambda *_, runs=runs: runs)
        kinds = ["ecoformer", "reference"]
        contenders = cores.core_contenders(inputs, has_backward=False, kinds=kinds)
        assert [contender.pass_bytes for contender in contenders] == [expected, None]


def test_core_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_core(CPU, torch.float32, num_tokens=63).is_passed
    right = kernelized_hash_attention
    wrong = lambda *rows, **functions: 1.01 * right(*rows, **functions)  # noqa: E731
    monkeypatch.setattr(correctness, "kernelized_hash_attention", wrong)
    check = check_core(CPU, torch.float32, num_tokens=63)
    assert not check.is_passed
    assert max(check.errors) == pytest.approx(0.01, rel=1e-2)
    assert "FAILED" in str(check)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("attention", {"ecoformer", "reference", "sdpa", "performer", "spatial reduction"}),
        ("convolution", {"ecoformer", "pytorch", "pytorch, channels first", "reference"}),
        ("fit", {"ecoformer", "reference"}),
        ("model", {"ecoformer", "ecoformer, reference ops", "msa", "sra", "timm"}),
        ("train", {"ecoformer", "performer", "timm"}),
        ("dense", {"ecoformer", "sra", "msa"}),
    ],
)
def test_tasks_run(
    task: str,
    expected: set[str],
    setup: Setup,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "figures.json"
    # One image of 32 pixels has fewer tokens than anchors.
    side = "64" if task == "dense" else "32"
    words = [task, "--device", "cpu", "--resolutions", side, "--batch-size", "2", "--rounds", "1"]
    assert main([*words, "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    timed = {row["name"] for row in content["rows"] if row["timing"]}
    assert timed >= expected
    assert all(row["timing"]["median_ms"] > 0 for row in content["rows"] if row["timing"])
    assert content["environment"]["command"].endswith(str(file))
    said = capsys.readouterr().out
    assert "x time" in said
    assert ("passed" in said) == (task == "attention")


def test_steps_of_sequences_are_timed_over_their_length(
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sequences, "SLOPE_FROM", 48)
    file = tmp_path / "figures.json"
    words = ["sequences", "--device", "cpu", "--tokens", "96", "32", "64", "48", "--rounds", "1"]
    assert main([*words, "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert [row["num_tokens"] for row in content["rows"][::3]] == [32, 48, 64, 96]
    assert {row["name"] for row in content["rows"]} == {"ecoformer", "msa", "performer"}
    times = [
        (row["num_tokens"], row["timing"]["median_ms"])
        for row in content["rows"]
        if row["name"] == "msa" and row["num_tokens"] >= 48
    ]
    numbers, medians = (np.log(column) for column in zip(*times, strict=True))
    (slope,) = (slope["time"] for slope in content["slopes"] if slope["name"] == "msa")
    assert slope == pytest.approx(np.polyfit(numbers, medians, 1)[0])
    said = capsys.readouterr().out
    assert "exponent of N: time per sequence" in said and "| sequences/s |" in said
    assert "image" not in said


def test_a_step_changes_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = find_family("encoder").create_model(
        "encoder", "ecoformer", num_classes=10, num_words=256, max_tokens=33
    )
    model = with_random_hash_functions(model)
    monkeypatch.setattr(sequences, "with_random_hash_functions", lambda _: model)
    step = sequences.build_step("ecoformer", 2, 33, CPU, torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    step()
    assert not any(old.equal(new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_step_with_softmax_is_left_out_where_it_takes_minutes(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = dense.DenseInputs(2, 96, CPU)
    assert (inputs.long_side, inputs.num_tokens) == (160, 24 * 40)
    assert inputs.draw_images().shape == (2, 3, 96, 160)
    for target in inputs.draw_targets():
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        assert (sides > 0).all() and (target["boxes"] >= 0).all()
    monkeypatch.setitem(dense._MAX_PAIRS, "cpu", 2 * 960**2 - 1)
    maps, step, fit = dense.measure_dense(setup, variant="pvt_v2_b0", batch_size=2, short_side=96)
    assert all(row.timing for row in (*maps, *fit))
    assert {row.name: row.note for row in step if row.note} == {"msa": "not run: takes minutes"}
    assert [row.batch_size for row in (*maps, *fit)] == [2, 2, 2, 1]


def test_a_benchmark_goes_on_in_the_next_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    words = ["convolution", "--device", "cpu", "--resolutions", "32", "64", "--batch-size", "1"]
    words += ["--rounds", "1", "--json", str(file), "--time-budget", "0"]
    assert main(words) == 0
    assert "left for the next call of the same command: convolution at 64 px" in read_out(capsys)
    first = json.loads(file.read_text())
    assert list(first["done"]) == ["convolution at 32 px"]
    # As by a call that is cut off in its second part.
    file.write_text(json.dumps(first | {"rows": [*first["rows"], first["rows"][0]]}))
    assert main(words) == 0
    assert "left for" not in read_out(capsys)
    both = json.loads(file.read_text())
    assert both["done"] == {
        "convolution at 32 px": len(first["rows"]),
        "convolution at 64 px": len(both["rows"]),
    }
    assert both["rows"][: len(first["rows"])] == first["rows"]
    assert main(words) == 0
    assert json.loads(file.read_text())["rows"] == both["rows"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "needs --json FILE"),
        ("{}", "holds no figures to go on from"),
        ('{"environment": {"command": "x"}, "copy_bytes_per_s": 1', "holds no figures"),
        (Report({"command": "x"}, 1e9).to_json(), "figures of another command \\(x\\)"),
    ],
)
def test_a_benchmark_that_cannot_go_on(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    words = ["convolution", "--device", "cpu", "--time-budget", "1"]
    if content is not None:
        file.write_text(content)
        words += ["--json", str(file)]
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert content is None or file.read_text() == content


def test_what_is_measured_is_written_before_the_next(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_one(setup: Setup, **_: object) -> Iterator[list[Measurement]]:
        yield [make_row("first", 64, 1.0)]
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "measure_attention", measure_one)
    file = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        main(["attention", "--device", "cpu", "--resolutions", "32", "--json", str(file)])
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["first"]


def test_a_wrong_core_is_said_and_measured_all_the_same(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_core(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(correctness, "kernelized_hash_attention", fail_core)
    words = ["--device", "cpu", "--resolutions", "32", "--batch-size", "1", "--rounds", "1"]
    assert main(["attention", *words]) == 1
    said = capsys.readouterr().out
    assert "check: core of N=63 FAILED, RuntimeError: no kernel" in said
    assert "attention core, evaluation, B=1 N=64" in said


def test_gpu_preset_runs_in_the_interpreter_without_what_a_gpu_machine_may_lack(
    tmp_path: Path,
) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "figures.json"
    words = ["gpu", "--device", "cpu", "--resolutions", "32", "--batch-size", "1", "--rounds", "1"]
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('tensorboard', 'matplotlib')))\n"
        "from ecoformer.tools import measure\n"
        "measure._COPY_BYTES['cpu'] = 2**20\n"
        "measure.PeakMemory.measure = lambda self, build, call=None: None\n"
        # Convolutions of whole models would take the interpreter half a minute.
        "from ecoformer.models import mlp\n"
        "mlp.has_kernel = lambda x: False\n"
        "from ecoformer.tools.benchmark.command import main\n"
        f"code = main({[*words, '--no-compile', '--json', str(file)]})\n"
        "assert 'ecoformer.ops.backends.triton.launch' in sys.modules\n"
        "sys.exit(code)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(file.read_text())
    assert all("passed" in check for check in content["checks"])
    assert all(row["timing"] for row in content["rows"] if row["name"] == "ecoformer")
    assert {row["task"] for row in content["rows"] if row["name"] == "ecoformer"} == {
        cores.EVALUATION,
        cores.TRAINING,
        convolutions.EVALUATION,
        convolutions.TRAINING,
        fits.TASK,
        "pvt_v2_b0, evaluation",
        "pvt_v2_b0, training step",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--resolutions", "16"], "32 pixels"),
        (["--rounds", "0"], "--rounds"),
        (["--model", "pvt_v2_b9", "model"], "pvt_v2_b0"),
        (["sequences", "--tokens", "16"], "--tokens start at 32"),
        (["attention", "--tokens", "1024"], "--tokens are of sequences"),
        (["deploy", "--dtype", "bfloat16"], "--dtype means nothing to deploy; leave it out"),
        (["data", "--model", "pvt_v2_b1"], "--model means nothing to data"),
        (["threads", "--no-compile"], "--compile means nothing to threads"),
        (["model", "--data-path", "."], "--data-path means nothing to model"),
        (["threads", "--resolutions", "64", "224"], "threads takes one of --resolutions"),
        (["--plot", "curves.pdf"], "curves.pdf: the picture is a PNG"),
        (["--plot", "no_such_folder/curves.png"], "no folder no_such_folder"),
        (["--plot", "a.png", "fit"], "3 image sides or more, not 2"),
        (["--plot", "a.png", "--resolutions", "224", "448", "224"], "not 2"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("device", "expected"), [("cuda", "--device cpu"), ("gpu", "cuda:N")])
def test_missing_device_is_said(
    device: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["--device", device]) == 2
    assert expected in capsys.readouterr().err
