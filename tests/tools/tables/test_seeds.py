"""Means, intervals and paired differences over seeds, against figures worked out by hand."""

from __future__ import annotations

import pytest

from ecoformer.tools.table import format_markdown
from ecoformer.tools.tables.seeds import describe_seeds, seed_columns

# t of two degrees of freedom at 0.975, over the root of three.
FACTOR = 4.302652729911275 / 3**0.5


def test_intervals_are_those_of_student() -> None:
    row = describe_seeds({0: 81.0, 1: 83.0, 2: 88.0})
    assert (row["top1"], row["num_seeds"]) == (84, 3)
    assert row["top1_std"] == pytest.approx(13**0.5)
    assert row["top1_ci95"] == pytest.approx(FACTOR * 13**0.5)
    assert "difference" not in row


def test_differences_are_paired_by_seed() -> None:
    # 1, 2 and 3 points above: far surer than either mean.
    row = describe_seeds({0: 81.0, 1: 83.0, 2: 88.0}, {2: 85.0, 1: 81.0, 0: 80.0})
    assert row["difference"] == pytest.approx(2)
    assert row["difference_ci95"] == pytest.approx(FACTOR)


def test_seeds_of_one_side_alone_make_no_pair() -> None:
    row = describe_seeds({0: 81.0, 1: 83.0}, {1: 80.0, 2: 0.0})
    assert (row["top1"], row["difference"], row["num_seeds"]) == (82, 3, 2)
    assert "difference_ci95" not in row


def test_equal_results_have_an_interval_of_nothing() -> None:
    row = describe_seeds({0: 80.0, 1: 80.0}, {0: 79.0, 1: 79.0})
    assert (row["top1_ci95"], row["difference_ci95"]) == (0, 0)


def test_one_seed_has_no_interval() -> None:
    row = describe_seeds({3: 81.0}, {3: 80.0})
    assert (row["top1"], row["difference"], row["num_seeds"]) == (81, 1, 1)
    assert not {"top1_std", "top1_ci95", "difference_ci95"} & row.keys()


def test_columns_show_what_is_described() -> None:
    rows = [describe_seeds({0: 1.0, 1: 3.0}, {0: 0.0, 1: 1.0}, key="loss")]
    header = format_markdown(seed_columns("loss", "loss"), rows).splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        *("loss", "+- 95 %", "std", "vs first row", "vs first +- 95 %", "seeds"),
    ]
