"""Time one thread against all, alone and beside another job on every core."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from ecoformer.hash_config import HashConfig
from ecoformer.hashing import fit_hash_functions
from ecoformer.models.registry import find_family
from ecoformer.tools.benchmark.backbones import Workload, build_model
from ecoformer.tools.measure import Call
from ecoformer.tools.table import Column, Row, Table

# The calls of a turn take about this long together.
_TURN_SECONDS = 1.0
_NUM_FIT_IMAGES = 8
# Side in pixels, and steps a bit. With all its 100 the large one would take minutes.
_FITS = {"hash fit, small": (64, 100), "hash fit, large": (224, 10)}

# In a process with so many threads: the calls, by name, built once.
_calls: dict[str, Call] = {}


def measure_threads(work: Workload, *, num_rounds: int, environment: dict[str, str]) -> Table:
    """Time evaluation, a training step and fits of a PVTv2, all numbers of threads in turns.

    Args:
        work: an evaluation; the training step has its sizes, the fits their own.
        environment: command, date, hardware and versions, by name.
    """
    num_threads = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    rows: list[Row] = []
    with (
        ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as one,
        ProcessPoolExecutor(1, context, torch.set_num_threads, (num_threads,)) as many,
    ):
        for num_jobs in (0, multiprocessing.cpu_count()):
            for name in ("evaluation", "training step", *_FITS):
                seconds: list[tuple[float, float]] = []
                with _busy_cores(num_jobs):
                    for _ in range(num_rounds):
                        turns = [
                            pool.submit(_take_turn, name, work).result() for pool in (one, many)
                        ]
                        seconds.append((turns[0], turns[1]))
                rows.append(
                    {
                        "name": name,
                        "jobs": num_jobs,
                        "one_s": statistics.median(first for first, _ in seconds),
                        "many_s": statistics.median(second for _, second in seconds),
                        "ratio": statistics.median(second / first for first, second in seconds),
                    }
                )
    columns = (
        Column("name", ""),
        Column("jobs", "other busy processes", spec=".0f"),
        Column("one_s", "1 thread, ms", spec=".1f", scale=1e-3),
        Column("many_s", f"{num_threads} threads, ms", spec=".1f", scale=1e-3),
        Column("ratio", "ratio"),
    )
    notes = [
        f"{work.variant}; evaluation and training step of {work.batch_size} images of "
        f"{work.resolution} px; fits of all layers on {_NUM_FIT_IMAGES} images, "
        + " and ".join(f"of {side} px with {steps} steps a bit" for side, steps in _FITS.values())
        + f". Medians of {num_rounds} turns; the ratio is that of turns side by side, above 1 "
        "where more threads are slower.",
    ]
    return Table("Threads, alone and beside other jobs", columns, rows, notes, environment)


@contextmanager
def _busy_cores(num_jobs: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_spin, daemon=True) for _ in range(num_jobs)]
    for job in jobs:
        job.start()
    try:
        yield
    finally:
        for job in jobs:
            job.terminate()
            job.join()


def _spin() -> None:
    while True:
        pass


def _take_turn(name: str, work: Workload) -> float:
    """Median seconds of a call, in the process that has its number of threads."""
    if name not in _calls:
        _calls[name] = _build(name, work)
        _calls[name]()
    seconds: list[float] = []
    while sum(seconds) < _TURN_SECONDS:
        start = time.perf_counter()
        _calls[name]()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _build(name: str, work: Workload) -> Call:
    if name in _FITS:
        side, num_steps = _FITS[name]
        torch.manual_seed(0)
        hashing = HashConfig(num_fit_steps=num_steps)
        model = find_family(work.variant).create_model(work.variant, hashing=hashing).eval()
        return partial(fit_hash_functions, model, torch.randn(_NUM_FIT_IMAGES, 3, side, side))
    work = replace(work, is_training=name == "training step")
    return build_model("ecoformer", work, torch.device("cpu"), torch.float32)
