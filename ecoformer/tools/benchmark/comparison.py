"""Contenders for one task, measured side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ecoformer.errors import InputError
from ecoformer.tools.benchmark.measurements import Measurement
from ecoformer.tools.measure import Build, Call, PeakMemory, Stopwatch, free_bytes, take_turns

# Floats that the dense reference holds at once for each pair of tokens.
REFERENCE_FLOATS = 8


@dataclass(frozen=True)
class Setup:
    """Where and how often things are measured.

    Args:
        dtype: of attention's inputs, and of autocast around models.
        num_rounds: turns that each contender takes.
    """

    device: torch.device
    dtype: torch.dtype
    num_rounds: int
    memory: PeakMemory


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Args:
        pass_bytes: what its passes read and write, where that is known.
        why_not: the reason not to run it; empty to run it.
    """

    name: str
    build: Build
    pass_bytes: int | None = None
    why_not: str = ""


def lack_of_memory(num_bytes: int, device: torch.device) -> str:
    """Give the ``Contender.why_not`` of what holds so much at once; empty if it fits."""
    return f"needs {num_bytes / 1e9:.3g} GB" if num_bytes > free_bytes(device) else ""


class Comparison:
    """Contenders for one task at one size, built and warmed up; one that fails is left out.

    Args:
        contenders: the shipped implementation first.
        least_bytes: what any of them must read and write.
        is_captured: as for ``Stopwatch``.

    Attributes:
        watches: of the contenders that run, by name.

    Raises:
        InputError: a contender cannot be what the user asked for.
    """

    def __init__(
        self,
        setup: Setup,
        task: str,
        contenders: Sequence[Contender],
        *,
        batch_size: int,
        num_tokens: int,
        least_bytes: int | None = None,
        is_captured: bool = True,
    ) -> None:
        self.setup = setup
        self._contenders = contenders
        self._make_row = partial(
            Measurement, task, batch_size=batch_size, num_tokens=num_tokens, least_bytes=least_bytes
        )
        self._notes = {c.name: f"not run: {c.why_not}" for c in contenders if c.why_not}
        self._calls: dict[str, Call] = {}
        self.watches: dict[str, Stopwatch] = {}
        for contender in contenders:
            if contender.why_not:
                continue
            try:
                call = contender.build()
                watch = Stopwatch(call, setup.device, is_captured=is_captured)
            except InputError:
                raise
            except Exception as error:
                self._notes[contender.name] = f"failed: {_describe(error)}"
            else:
                self._calls[contender.name], self.watches[contender.name] = call, watch

    def finish(self) -> list[Measurement]:
        """Measure the memory of each contender, and let go of it; they have taken their turns."""
        timings = {name: watch.timing for name, watch in self.watches.items()}
        # Captured graphs hold memory of their own.
        self.watches.clear()
        peaks: dict[str, int | None] = {}
        for contender in self._contenders:
            if contender.name in self._calls:
                try:
                    call = self._calls.pop(contender.name)
                    peaks[contender.name] = self.setup.memory.measure(contender.build, call)
                except Exception as error:
                    self._notes[contender.name] = f"memory not measured: {_describe(error)}"
        if self.setup.device.type == "cuda":
            torch.cuda.empty_cache()
        return [
            self._make_row(
                contender.name,
                timing=timings.get(contender.name),
                peak_bytes=peaks.get(contender.name),
                pass_bytes=contender.pass_bytes,
                note=self._notes.get(contender.name, ""),
            )
            for contender in self._contenders
        ]


def compare(*comparisons: Comparison) -> Iterator[list[Measurement]]:
    """Time the contenders of all comparisons, which share a setup, in turns.

    Yields:
        A row a contender, for each comparison.
    """
    names = dict.fromkeys(name for comparison in comparisons for name in comparison.watches)
    # The sizes of one contender follow each other, and so meet the same machine.
    watches = [c.watches[name] for name in names for c in comparisons if name in c.watches]
    take_turns(watches, comparisons[0].setup.num_rounds)
    for comparison in comparisons:
        yield comparison.finish()


def compare_lengths(
    line_up: Callable[[int, Mapping[str, str]], Comparison],
    token_counts: Sequence[int],
    *,
    slow_seconds: float,
) -> Iterator[list[Measurement]]:
    """Compare over a range of N; what became slow is not run at larger N.

    All sizes take turns, so that none has the machine at its best alone.

    Args:
        line_up: makes the comparison of one N, given the ``Contender.why_not`` of what became slow.
        token_counts: N, rising.
    """
    too_slow: dict[str, str] = {}
    comparisons = []
    for num_tokens in token_counts:
        comparison = line_up(num_tokens, too_slow)
        for name, watch in comparison.watches.items():
            if watch.once_s > slow_seconds:
                too_slow[name] = f"slower than {slow_seconds:g} s at N={num_tokens}"
        comparisons.append(comparison)
    yield from compare(*comparisons)


def _describe(error: Exception) -> str:
    """Cut an error to its first sentence, of a hundred characters at most."""
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0][:100]
