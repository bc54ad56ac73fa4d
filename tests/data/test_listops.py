"""ListOps: labels by a parser of its own, lengths, balance, and bytes that depend on the index."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from ecoformer.data.listops import MAX_ARGUMENTS, MAX_DEPTH, WORDS, ListOps


def parse(tokens: np.ndarray) -> tuple[int, int, int]:
    """Evaluate with a stack; returns the value, the depth, and the most arguments of one list."""
    stack: list[tuple[str, list[int]]] = [("", [])]
    depth = num_arguments = 0
    for word in (WORDS[token] for token in tokens):
        if word.startswith("["):
            stack.append((word[1:], []))
            depth = max(depth, len(stack) - 1)
        elif word == "]":
            name, values = stack.pop()
            num_arguments = max(num_arguments, len(values))
            value = {
                "MIN": np.min(values),
                "MAX": np.max(values),
                "MED": np.floor(statistics.median(values)),
                "SM": np.sum(values) % 10,
            }[name]
            stack[-1][1].append(int(value))
        else:
            stack[-1][1].append(int(word))
    ((_, (value,)),) = stack
    return value, depth, num_arguments


@pytest.mark.parametrize("max_tokens", [20, 100, 2000])
def test_the_label_is_what_a_parser_finds_and_sizes_keep_their_limits(max_tokens: int) -> None:
    data = ListOps("train", max_tokens=max_tokens)
    depths, lengths = set[int](), set[int]()
    for index in range(60):
        tokens, label = data.read(index)
        value, depth, num_arguments = parse(tokens)
        assert value == label
        assert num_arguments <= MAX_ARGUMENTS and depth <= MAX_DEPTH
        assert max_tokens // 4 <= len(tokens) <= max_tokens
        depths.add(depth)
        lengths.add(len(tokens))
    assert len(lengths) > min(10, max_tokens // 4)
    assert max_tokens < 2000 or max(depths) == MAX_DEPTH


def test_each_class_is_a_tenth_in_any_part_of_the_data() -> None:
    data = ListOps("val", max_tokens=20)
    labels = np.array([data.read(index)[1] for index in range(1000)])
    assert (np.bincount(labels) == 100).all()


def test_a_sequence_depends_on_split_and_index_alone() -> None:
    first = ListOps("train", max_tokens=100)
    later = [first.read(index)[0].tobytes() for index in (5, 3, 5)]
    assert later[0] == later[2] == ListOps("train", max_tokens=100).read(5)[0].tobytes()
    assert later[0] != later[1]
    assert later[0] != ListOps("val", max_tokens=100).read(5)[0].tobytes()


def test_no_word_tells_the_class_alone() -> None:
    # The number of each word, class by class, by a linear reader: the best guess stays near chance.
    data = ListOps("train", max_tokens=60)
    read = [data.read(index) for index in range(1500)]
    counts = np.array([np.bincount(tokens, minlength=len(WORDS)) for tokens, _ in read])
    labels = np.array([label for _, label in read])
    design = np.c_[counts, np.ones(len(counts))]
    weights, *_ = np.linalg.lstsq(design[:1000], np.eye(10)[labels[:1000]], rcond=None)
    accuracy = (np.argmax(design[1000:] @ weights, 1) == labels[1000:]).mean()
    assert accuracy < 0.35
