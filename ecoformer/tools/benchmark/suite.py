"""Run the parts of a benchmark, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ecoformer.engine.launch import choose_device
from ecoformer.errors import InputError, describe_error
from ecoformer.files import write_text
from ecoformer.tools.benchmark import sequences
from ecoformer.tools.benchmark.backbones import Workload, measure_model
from ecoformer.tools.benchmark.comparison import Setup
from ecoformer.tools.benchmark.convolutions import measure_convolutions
from ecoformer.tools.benchmark.cores import count_tokens, measure_attention, measure_attention_sweep
from ecoformer.tools.benchmark.correctness import Check, check_core
from ecoformer.tools.benchmark.dense import measure_dense
from ecoformer.tools.benchmark.fits import measure_fit
from ecoformer.tools.benchmark.measurements import MIN_POINTS, Measurement, Report
from ecoformer.tools.measure import (
    PeakMemory,
    copy_bandwidth,
    describe_environment,
    settle_allocator,
)


@dataclass(frozen=True)
class Suite:
    """What is measured, at which sizes, where and how often.

    Args:
        parts: ``"attention"``, ``"convolution"``, ``"fit"``, ``"model"``, ``"train"`` or
            ``"dense"`` to image sides in pixels, the short ones for ``"dense"``, and
            ``"sequences"`` to numbers of tokens, in the order to measure them in.
        variant: of PVTv2.
        batch_size: images of attention cores and models, or sequences.
        is_compiled: models by ``torch.compile``.
        device: as ``--device`` takes it.
        dtype: name of a type of torch.
    """

    parts: Mapping[str, Sequence[int]]
    variant: str
    batch_size: int
    fit_batch_size: int
    is_compiled: bool
    device: str | None
    dtype: str
    num_rounds: int

    def check_plot(self, path: Path) -> None:
        """Refuse a picture that could not be drawn once everything is measured.

        Raises:
            InputError: it is no PNG, its folder is missing, or there are too few sizes.
        """
        if path.suffix.lower() != ".png":
            raise InputError(
                f"--plot {path}: the picture is a PNG; give it a name that ends in .png."
            )
        if not path.parent.is_dir():
            raise InputError(f"--plot {path}: there is no folder {path.parent}; make it first.")
        most = max(len(set(sides)) for sides in self.parts.values())
        if most < MIN_POINTS:
            raise InputError(
                f"--plot draws curves over {MIN_POINTS} image sides or more, not {most}; "
                "give more --resolutions (or --tokens)."
            )

    def check(self, setup: Setup) -> Iterator[Check]:
        """Check the first core that is timed, and one that fills no tile."""
        if "attention" in self.parts:
            num_tokens = count_tokens(self.parts["attention"][0])
            for count in (num_tokens, num_tokens - 1):
                yield check_core(setup.device, setup.dtype, num_tokens=count)

    def units(self, setup: Setup) -> Iterator[tuple[str, Iterator[list[Measurement]]]]:
        """Name what is measured, and measure it, comparison by comparison, once it is asked for."""
        for part, sizes in self.parts.items():
            counts = sizes if part == "sequences" else [count_tokens(side) for side in sizes]
            if part == "sequences":
                yield (
                    part,
                    sequences.measure_sequences(
                        setup, batch_size=self.batch_size, token_counts=sorted(counts)
                    ),
                )
            elif part == "attention":
                yield (
                    part,
                    measure_attention(setup, batch_size=self.batch_size, num_tokens=counts[0]),
                )
                if len(counts) > 1:
                    sweep = measure_attention_sweep(setup, token_counts=sorted(counts))
                    yield f"{part} over sizes", sweep
            else:
                for side in sizes:
                    yield f"{part} at {side} px", self._measure_side(setup, part, side)

    def _measure_side(self, setup: Setup, part: str, side: int) -> Iterator[list[Measurement]]:
        num_tokens = count_tokens(side)
        if part == "convolution":
            return measure_convolutions(setup, batch_size=self.batch_size, num_tokens=num_tokens)
        if part == "fit":
            return measure_fit(setup, batch_size=self.fit_batch_size, num_tokens=num_tokens)
        if part == "dense":
            return measure_dense(
                setup, variant=self.variant, batch_size=self.batch_size, short_side=side
            )
        work = Workload(
            self.variant,
            self.batch_size,
            side,
            is_training=part == "train",
            is_compiled=self.is_compiled,
        )
        return measure_model(setup, work)


def run_suite(
    suite: Suite,
    command: str,
    *,
    json: Path | None,
    plot: Path | None,
    time_budget: float | None = None,
) -> bool:
    """Check, measure and print; write ``json`` after each comparison, ``plot`` at the end.

    Args:
        time_budget: minutes after which nothing more is begun, at least one part though; ``json``
            goes on where it ended then.

    Returns:
        Whether all checks are passed.

    Raises:
        InputError: no such device or model, the disk refuses, or ``json`` cannot go on.
    """
    began = time.monotonic()
    device = choose_device(suite.device)
    environment = describe_environment(command, device) | {"dtype": suite.dtype}
    settle_allocator()
    report = Report(environment, copy_bandwidth(device))
    if "sequences" in suite.parts:
        report = replace(report, sample="sequence", slope_from=sequences.SLOPE_FROM)
    if json and time_budget is not None and json.exists():
        report = _go_on(report, json)

    def tell(lines: Iterable[str]) -> None:
        """Print and write what there is so far, which may be all that there will be."""
        if text := "\n".join(lines):
            print(text, end="\n\n", flush=True)
        if json:
            write_text(json, report.to_json())

    tell([report.describe_environment()])
    with PeakMemory(device) as memory:
        setup = Setup(device, getattr(torch, suite.dtype), suite.num_rounds, memory)
        checks = list(suite.check(setup))
        report.checks[:] = map(str, checks)
        tell(report.checks)
        left = []
        has_begun = False
        for name, comparisons in suite.units(setup):
            if name in report.done:
                continue
            is_late = time_budget is not None and time.monotonic() - began > 60 * time_budget
            if has_begun and is_late:
                left.append(name)
                continue
            has_begun = True
            for rows in comparisons:
                report.rows.extend(rows)
                tell([report.describe_comparison(rows)])
            report.done[name] = len(report.rows)
    if left:
        tell([f"left for the next call of the same command: {', '.join(left)}"])
        return all(check.is_passed for check in checks)
    tell([report.describe_slopes()])
    if plot:
        report.draw(plot)
    return all(check.is_passed for check in checks)


def _go_on(report: Report, json: Path) -> Report:
    """Take what an earlier call of the same command finished, beside how it was measured."""
    try:
        earlier = Report.from_json(json.read_text())
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"--json {json} holds no figures to go on from ({describe_error(error)}); give another "
            "name."
        ) from error
    for name in ("command", "hardware", "versions"):
        if earlier.environment.get(name) != report.environment.get(name):
            raise InputError(
                f"--json {json} holds figures of another {name} ({earlier.environment.get(name)}); "
                "give another name."
            )
    return earlier
