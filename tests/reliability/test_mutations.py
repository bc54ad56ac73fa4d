"""R17: training checkpoints with one value replaced are refused, or change nothing."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecoformer.checkpoint import read_checkpoint
from ecoformer.config import Config
from ecoformer.engine.resume import restore
from ecoformer.engine.state import TrainState
from ecoformer.errors import InputError
from tests.engine.training import flatten, start_as_configured
from tests.reliability.runs import LAST, TINY, Run, Strike, start

Place = tuple[Any, ...]


@pytest.fixture(scope="module")
def stopped(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Inside the second epoch."""
    found = start(flags, tmp_path_factory.mktemp("stopped"), hook=Strike("step", 4, signal.SIGTERM))
    assert found.wait() == [75], found.said()
    return found


def begin(settings: dict[str, Any]) -> tuple[TrainState, Config]:
    """A fresh state of the same run."""
    config = Config.from_flat(settings)
    model = TINY.create_model("tiny", hashing=config.hashing, num_classes=2)
    return start_as_configured(model, config), config


def describe(state: TrainState, config: Config) -> dict[str, Any]:
    """All that the next step depends on, by path."""
    return flatten(deepcopy(state.to_checkpoint(config)))


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def list_places(value: Any, path: Place = ()) -> list[Place]:
    """Every value of a nest, containers too."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [
        place for key, item in items for place in ((*path, key), *list_places(item, (*path, key)))
    ]


def nest(depth: int) -> Any:
    """Twice as much at each level, and little of it in memory."""
    value: Any = [1.5]
    for _ in range(depth):
        value = [value, value]
    return value


def spoil(tensor: Any) -> Any:
    """One value of a tensor that is no number."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return float("nan")
    spoilt = tensor.clone()
    spoilt.view(-1)[-1] = float("nan")
    return spoilt


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda value: None,
    "text": lambda value: "text" if value != "text" else 1,
    "bytes": lambda value: b"1",
    "list": lambda value: [value],
    "dict": lambda value: {"value": value},
    "empty": lambda value: {},
    "bool": lambda value: True,
    "huge": lambda value: 2**200,
    "infinite": lambda value: float("inf"),
    "nan": spoil,
    "half": lambda value: value.half() if isinstance(value, Tensor) else torch.ones(2).half(),
    "longer": lambda value: torch.ones(7),
    "no axes": lambda value: torch.tensor(-1.0),
    "nest": lambda value: nest(40),
    "deep": lambda value: nest(0) if value is None else {0: {0: nest(12)}},
}


def mutate(checkpoint: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], str]:
    """One value deleted or replaced; places near the root are as likely as those far below."""
    places = list_places(checkpoint)
    depth = draw.randint(1, max(map(len, places)))
    place = draw.choice([place for place in places if len(place) == depth])
    mutated = deepcopy(checkpoint)
    owner: Any = mutated
    for key in place[:-1]:
        owner = owner[key]
    name = draw.choice(["deleted", *MUTATIONS])
    if name == "deleted":
        del owner[place[-1]]
    else:
        owner[place[-1]] = MUTATIONS[name](owner[place[-1]])
    return mutated, f"{'/'.join(map(str, place))} {name}"


@pytest.mark.parametrize(
    ("first", "num_mutations"), [(0, 50), pytest.param(50, 700, marks=pytest.mark.slow)]
)
def test_one_value_replaced(first: int, num_mutations: int, stopped: Run, tmp_path: Path) -> None:
    checkpoint = dict(read_checkpoint(stopped.folder / LAST))
    expected_state, config = begin(checkpoint["config"])
    restore(expected_state, deepcopy(checkpoint), config, "whole")
    expected = describe(expected_state, config)
    path = tmp_path / "mutated.pth"
    num_refused = 0
    for number in range(first, first + num_mutations):
        mutated, what = mutate(checkpoint, random.Random(number))
        torch.save(mutated, path)
        state, config = begin(checkpoint["config"])
        fresh = describe(state, config)
        began = time.monotonic()
        try:
            restore(state, read_checkpoint(path), config, str(path))
        except InputError as error:
            num_refused += 1
            assert str(path) in str(error), what
            assert equal(describe(state, config), fresh), what
        else:
            assert equal(describe(state, config), expected), what
        assert time.monotonic() - began < 5, what
    print(f"{num_refused} of {num_mutations} refused, the others equal")
    assert num_refused > num_mutations // 2
