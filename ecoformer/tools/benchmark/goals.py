"""What the implementation aims at, and whether it got there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ecoformer.tools.benchmark import cores, fits
from ecoformer.tools.benchmark.models import name_task
from ecoformer.tools.benchmark.report import Report, Row

_MODEL = name_task("pvt_v2_b0", is_training=False, is_compiled=False)
_COMPILED = name_task("pvt_v2_b0", is_training=False, is_compiled=True)
# Device, task, N and peer: how many times faster than the peer.
_FASTER = {
    ("cpu", cores.EVALUATION, 3136, "sdpa"): 25.0,
    ("cpu", cores.EVALUATION, 3136, "reference"): 20.0,
    ("cpu", cores.TRAINING, 3136, "sdpa"): 10.0,
    ("cpu", cores.TRAINING, 3136, "reference"): 10.0,
    ("cpu", _MODEL, 3136, "ecoformer, reference ops"): 3.5,
    ("cpu", _MODEL, 3136, "timm"): 1.3,
    ("cpu", _MODEL, 12544, "timm"): 1.4,
    ("cuda", cores.EVALUATION, 3136, "sdpa, flash"): 10.0,
    ("cuda", cores.TRAINING, 3136, "sdpa, flash"): 5.0,
    ("cuda", _COMPILED, 3136, "msa"): 1.0,
    ("cuda", _COMPILED, 16384, "msa"): 2.0,
}
_CUDA_PASS_SHARE = 0.6
_CUDA_FIT_MS = 500.0
_TIME_SLOPE, _MEMORY_SLOPE = 1.05, 1.02


def judge_comparison(report: Report, rows: Sequence[Row], device: str) -> Iterator[str]:
    """Hold a comparison against the goals that it has.

    Args:
        report: that the rows are of.
        rows: of all contenders, the shipped one first.
        device: its type.

    Yields:
        A line a goal.
    """
    first = rows[0]
    if first.timing is None:
        return
    for row in rows:
        goal = _FASTER.get((device, row.task, row.num_tokens, row.name))
        if goal and row.timing:
            yield _at_least(goal, row.image_ms / first.image_ms, f"x faster than {row.name}")
    if device == "cuda" and first.task == cores.EVALUATION and first.pass_bytes is not None:
        yield _at_least(_CUDA_PASS_SHARE, report.pass_share(first), "of a copy, by its passes")
    if device == "cuda" and first.task == fits.TASK and first.num_tokens == 3136:
        yield _at_most(_CUDA_FIT_MS, first.timing.median_ms, "ms")


def judge_slopes(report: Report) -> Iterator[str]:
    """Hold the growth of the shipped core against its goals.

    Args:
        report: with a sweep, or without.

    Yields:
        A line a goal.
    """
    for slope in report.slopes():
        if (slope.task, slope.name) == (cores.SWEEP, "ecoformer"):
            yield _at_most(_TIME_SLOPE, slope.time, "as exponent of time")
            if slope.memory is not None:
                yield _at_most(_MEMORY_SLOPE, slope.memory, "as exponent of memory")


def _at_least(goal: float, figure: float, what: str) -> str:
    return f"goal: {figure:.3g} {what}, at least {goal:g}: {_verdict(figure >= goal)}"


def _at_most(goal: float, figure: float, what: str) -> str:
    return f"goal: {figure:.3g} {what}, at most {goal:g}: {_verdict(figure <= goal)}"


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"
