"""ListOps: nested operations on digits, written as one long sequence of tokens.

The generator is this project's own. Its classes are balanced; those of the published files are not.

Source: ListOps, arXiv 1804.06028; in its long form, Long Range Arena, arXiv 2011.04006.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from ecoformer.data.datasets import Fingerprint, fingerprint_first
from ecoformer.seeding import derive_seed

MAX_ARGUMENTS = 10
MAX_DEPTH = 10
NUM_SEQUENCES = {"train": 96000, "val": 2000, "test": 2000}


def _median(digits: Sequence[int]) -> int:
    """Of an even number of digits, the mean of the middle two, rounded down."""
    rising = sorted(digits)
    return (rising[(len(digits) - 1) // 2] + rising[len(digits) // 2]) // 2


OPERATORS: tuple[tuple[str, Callable[[Sequence[int]], int]], ...] = (
    ("[MIN", min),
    ("[MAX", max),
    ("[MED", _median),
    ("[SM", lambda digits: sum(digits) % 10),
)
# A token is a place in here: digits are their own numbers.
WORDS = (*map(str, range(10)), *(name for name, _ in OPERATORS), "]")
_END = len(WORDS) - 1

# The arguments of an operation: others, or None where a digit is to come.
_Shape: TypeAlias = "list[_Shape | None]"


class ListOps:
    """One split of ListOps, written while it is read.

    Sequence i depends on the split, the length and i alone, and its class is ``i % 10``. Lengths
    are spread evenly, as are operators, the number of arguments, and digits as far as the class
    leaves them free.

    Args:
        max_tokens: of a sequence; the shortest ones have a quarter of it.
    """

    class_names: Sequence[str] = WORDS[:10]
    num_words = len(WORDS)

    def __init__(self, split: str, *, max_tokens: int = 2000) -> None:
        self.split = split
        self.max_tokens = max_tokens

    def __len__(self) -> int:
        return NUM_SEQUENCES[self.split]

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Write a sequence, [N], int64, places in ``WORDS``, and give what it evaluates to."""
        generator = random.Random(derive_seed("LISTOPS", self.split, self.max_tokens, index))
        num_tokens = generator.randint(self.max_tokens // 4 + 2, self.max_tokens)
        shape = _grow(generator, num_tokens)
        label = index % len(self.class_names)
        tokens: list[int] = []
        # The shape stays, so that no class is longer or deeper than another.
        while _write(shape, generator, tokens) != label:
            tokens.clear()
        return np.array(tokens), label

    def describe(self, index: int) -> str:
        return f"LISTOPS {self.split} sequence {index}"

    def fingerprint(self) -> Fingerprint:
        return fingerprint_first(self)


def _grow(generator: random.Random, num_tokens: int) -> _Shape:
    """Put operations where digits were, until as many tokens are there, or up to two fewer."""
    root: _Shape = []
    # Where a digit is: the arguments, its place among them, and how deep a list there would be.
    places: list[tuple[_Shape, int, int]] = []
    inner, depth, num_left = root, 1, num_tokens - 1
    while True:
        num_arguments = generator.randint(2, min(MAX_ARGUMENTS, num_left - 1))
        inner += [None] * num_arguments
        if depth < MAX_DEPTH:
            places += ((inner, place, depth + 1) for place in range(num_arguments))
        # The operator and the bracket, but a digit less.
        num_left -= num_arguments + 1
        if num_left < 3:
            return root
        chosen = generator.randrange(len(places))
        places[chosen], places[-1] = places[-1], places[chosen]
        outer, place, depth = places.pop()
        inner = outer[place] = []


def _write(shape: _Shape, generator: random.Random, tokens: list[int]) -> int:
    """Append the tokens of an operation, its operators and digits drawn, and evaluate it."""
    operator = generator.randrange(len(OPERATORS))
    tokens.append(10 + operator)
    values = []
    for inner in shape:
        if inner is None:
            values.append(generator.randrange(10))
            tokens.append(values[-1])
        else:
            values.append(_write(inner, generator, tokens))
    tokens.append(_END)
    return OPERATORS[operator][1](values)
