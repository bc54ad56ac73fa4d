"""Time the published models within a budget, one pair after the other, so that it can go on.

Softmax and EcoFormer attention of a model take turns, so that a busy machine slows both alike.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from ecoformer.cost.executed import count_executed
from ecoformer.errors import InputError
from ecoformer.files import write_text
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import find_family
from ecoformer.tools.measure import Call, Stopwatch, take_turns
from ecoformer.tools.table import Value, format_csv, read_csv

# What two measurements share that must tell the same.
_IDENTITY = ("name", "batch_size", "input_size", "hardware")
# A stopwatch calls twice before it counts.
_NUM_WARMUP = 2
_MIN_ROUNDS, _MAX_ROUNDS = 5, 30


@dataclass(frozen=True)
class Timed:
    """How models are timed.

    Args:
        hardware: what they run on, in words: figures of other hardware are not taken over.
        minutes: that all of it may take.
    """

    batch_size: int
    device: torch.device
    hardware: str
    minutes: float


def time_models(sizes: Mapping[str, int], how: Timed, record: Path) -> dict[str, dict[str, Value]]:
    """Time the models that a record does not hold, after saying how long that takes.

    Args:
        sizes: ``"VARIANT/ATTENTION"`` to image side, pixels; the first of a variant is what its
            others are set against.
        record: a CSV file, to which a variant is added at once; it need not exist.

    Returns:
        Median images a second, quartiles, and the circumstances, by the same names.

    Raises:
        InputError: the budget is too small; nothing was timed.
    """
    rows: dict[str, dict[str, Value]] = {
        name: {
            "name": name,
            "batch_size": str(how.batch_size),
            "input_size": str(side),
            "hardware": how.hardware,
        }
        for name, side in sizes.items()
    }
    done = read_csv(record)
    results: dict[str, dict[str, Value]] = {}
    for name, row in rows.items():
        earlier = [other for other in done if all(other.get(key) == row[key] for key in _IDENTITY)]
        if earlier:
            results[name] = earlier[-1] | {
                key: float(value)
                for key, value in earlier[-1].items()
                if key.startswith(("images_per_s", "num_", "speedup")) and value
            }
    variants = dict.fromkeys(name.split("/")[0] for name in sizes if name not in results)
    pending = {
        variant: [name for name in sizes if name.split("/")[0] == variant] for variant in variants
    }
    for variant, seconds in _share_budget(pending, sizes, how, num_done=len(results)).items():
        timed = _time_in_turns(pending[variant], sizes[pending[variant][0]], how, seconds)
        for name, cells in timed.items():
            results[name] = rows[name] | cells
            done.append(results[name])
            print(f"{name}: {cells['images_per_s']:.2f} images/s", flush=True)
        write_text(record, format_csv(done))
    return results


def _share_budget(
    pending: Mapping[str, Sequence[str]], sizes: Mapping[str, int], how: Timed, num_done: int
) -> dict[str, float]:
    """Share the budget out by what is executed, once it is known to suffice; in seconds."""
    if not pending:
        return {}
    work = {
        variant: sum(_count_work(name, sizes[name]) for name in names)
        for variant, names in pending.items()
    }
    probe = min(work, key=lambda variant: work[variant])
    call = _build(pending[probe][0], sizes[pending[probe][0]], how)
    once_s = Stopwatch(call, how.device).once_s
    seconds_a_unit = once_s / _count_work(pending[probe][0], sizes[pending[probe][0]])
    least_s = (_NUM_WARMUP + _MIN_ROUNDS) * seconds_a_unit * sum(work.values())
    if not least_s <= 60 * how.minutes:  # NaN, too
        raise InputError(
            f"timing {len(work)} models takes about {least_s / 60:.0f} minutes here at batches of "
            f"{how.batch_size}; raise --time-budget {how.minutes:g}, or lower --batch-size."
        )
    print(
        f"timing {sum(map(len, pending.values()))} rows, {num_done} are done: within "
        f"{how.minutes:g} minutes, {least_s / 60:.1f} or so at least",
        flush=True,
    )
    return {variant: 60 * how.minutes * part / sum(work.values()) for variant, part in work.items()}


def _count_work(name: str, side: int) -> int:
    variant, attention = name.split("/")
    model = find_family(variant).create_empty(variant, attention, input_size=side)
    return count_executed(model, side)


def _build(name: str, side: int, how: Timed) -> Call:
    variant, attention = name.split("/")
    model = find_family(variant).create_model(variant, attention, input_size=side)
    model = with_random_hash_functions(model).eval().to(how.device)
    images = torch.randn(how.batch_size, 3, side, side, device=how.device)
    return torch.inference_mode()(partial(model, images))


def _time_in_turns(
    names: Sequence[str], side: int, how: Timed, seconds: float
) -> dict[str, dict[str, Value]]:
    """Time models until the seconds are over, some rounds at least and at most."""
    ends = time.monotonic() + seconds
    watches = {name: Stopwatch(_build(name, side, how), how.device) for name in names}
    for num_rounds in range(1, _MAX_ROUNDS + 1):
        take_turns(watches.values(), 1)
        if num_rounds >= _MIN_ROUNDS and time.monotonic() > ends:
            break
    rates = {name: how.batch_size * 1e3 / watch.timing.median_ms for name, watch in watches.items()}
    return {
        name: {
            "images_per_s": rates[name],
            "images_per_s_low": how.batch_size * 1e3 / watch.timing.high_ms,
            "images_per_s_high": how.batch_size * 1e3 / watch.timing.low_ms,
            "num_batches": watch.timing.num_calls,
            "speedup": rates[name] / rates[names[0]] if name != names[0] else None,
            "load": f"{os.getloadavg()[0]:.1f}",
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        }
        for name, watch in watches.items()
    }
