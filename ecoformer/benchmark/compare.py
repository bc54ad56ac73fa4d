"""Contenders for one task, measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ecoformer.benchmark.report import Row
from ecoformer.errors import InputError
from ecoformer.measure import Build, Call, PeakMemory, Stopwatch, free_bytes, take_turns

# The dense reference: floats that it holds at once for each pair of tokens.
REFERENCE_FLOATS = 8


@dataclass(frozen=True)
class Setup:
    """Where and how often things are measured.

    Args:
        device: CPU or CUDA.
        dtype: of attention's inputs, and of autocast around models.
        num_rounds: turns that each contender takes.
        memory: measures peak memory on the device.
    """

    device: torch.device
    dtype: torch.dtype
    num_rounds: int
    memory: PeakMemory


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Args:
        name: in tables.
        build: makes the call.
        pass_bytes: what its passes read and write, where that is known.
        why_not: the reason not to run it; empty to run it.
    """

    name: str
    build: Build
    pass_bytes: int | None = None
    why_not: str = ""


def lack_of_memory(num_bytes: int, device: torch.device) -> str:
    """Give the reason not to run what does not fit.

    Args:
        num_bytes: what it holds at once.
        device: where.

    Returns:
        For ``Contender.why_not``.
    """
    return f"needs {num_bytes / 1e9:.3g} GB" if num_bytes > free_bytes(device) else ""


def compare(
    setup: Setup,
    task: str,
    contenders: Sequence[Contender],
    *,
    batch_size: int,
    num_tokens: int,
    least_bytes: int | None = None,
    is_captured: bool = True,
) -> list[Row]:
    """Time contenders in turns, and measure the memory of each; one that fails is left out.

    Args:
        setup: where and how often.
        task: what they all do.
        contenders: the shipped implementation first.
        batch_size: B.
        num_tokens: N.
        least_bytes: what any of them must read and write.
        is_captured: as for ``Stopwatch``.

    Returns:
        A row each; that of a contender which did not run tells why.

    Raises:
        InputError: a contender cannot be what the user asked for.
    """
    calls: dict[str, Call] = {}
    watches: dict[str, Stopwatch] = {}
    notes = {c.name: f"not run: {c.why_not}" for c in contenders if c.why_not}
    for contender in contenders:
        if contender.why_not:
            continue
        try:
            call = contender.build()
            watches[contender.name] = Stopwatch(call, setup.device, is_captured=is_captured)
            calls[contender.name] = call
        except InputError:
            raise
        except Exception as error:
            notes[contender.name] = f"failed: {_describe(error)}"
    take_turns(watches.values(), setup.num_rounds)
    timings = {name: watch.timing for name, watch in watches.items()}
    # Captured graphs hold memory of their own.
    watches.clear()
    peaks: dict[str, int | None] = {}
    for contender in contenders:
        if contender.name in calls:
            try:
                call = calls.pop(contender.name)
                peaks[contender.name] = setup.memory.measure(contender.build, call)
            except Exception as error:
                notes[contender.name] = f"memory not measured: {_describe(error)}"
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    return [
        Row(
            task,
            contender.name,
            batch_size,
            num_tokens,
            timings.get(contender.name),
            peaks.get(contender.name),
            least_bytes,
            contender.pass_bytes,
            notes.get(contender.name, ""),
        )
        for contender in contenders
    ]


def _describe(error: Exception) -> str:
    """Its first sentence, of a hundred characters at most."""
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0][:100]
