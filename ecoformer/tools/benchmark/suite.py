"""Run the parts of a benchmark, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ecoformer.engine.launch import choose_device
from ecoformer.errors import InputError
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

    def measure(self, setup: Setup) -> Iterator[list[Measurement]]:
        """Yield comparisons, one after the other."""
        for part, sides in self.parts.items():
            if part == "sequences":
                yield from sequences.measure_sequences(
                    setup, batch_size=self.batch_size, token_counts=sorted(sides)
                )
                continue
            token_counts = [count_tokens(side) for side in sides]
            if part == "attention":
                yield from measure_attention(
                    setup, batch_size=self.batch_size, num_tokens=token_counts[0]
                )
                if len(sides) > 1:
                    yield from measure_attention_sweep(setup, token_counts=sorted(token_counts))
            elif part == "convolution":
                for num_tokens in token_counts:
                    yield from measure_convolutions(
                        setup, batch_size=self.batch_size, num_tokens=num_tokens
                    )
            elif part == "fit":
                for num_tokens in token_counts:
                    yield from measure_fit(
                        setup, batch_size=self.fit_batch_size, num_tokens=num_tokens
                    )
            elif part == "dense":
                for side in sides:
                    yield from measure_dense(
                        setup, variant=self.variant, batch_size=self.batch_size, short_side=side
                    )
            else:
                for side in sides:
                    work = Workload(
                        self.variant,
                        self.batch_size,
                        side,
                        is_training=part == "train",
                        is_compiled=self.is_compiled,
                    )
                    yield from measure_model(setup, work)


def run_suite(suite: Suite, command: str, *, json: Path | None, plot: Path | None) -> bool:
    """Check, measure and print; write ``json`` after each comparison, ``plot`` at the end.

    Returns:
        Whether all checks are passed.

    Raises:
        InputError: no such device or model, or the disk refuses.
    """
    device = choose_device(suite.device)
    environment = describe_environment(command, device) | {"dtype": suite.dtype}
    settle_allocator()
    slope_from = sequences.SLOPE_FROM if "sequences" in suite.parts else 0
    report = Report(environment, copy_bandwidth(device), slope_from=slope_from)

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
        report.checks.extend(map(str, checks))
        tell(report.checks)
        for rows in suite.measure(setup):
            report.rows.extend(rows)
            tell([report.describe_comparison(rows)])
    tell([report.describe_slopes()])
    if plot:
        report.draw(plot)
    return all(check.is_passed for check in checks)
