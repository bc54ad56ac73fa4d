"""How names on a command line become models."""

from __future__ import annotations

import pytest

import pvt
import twins
from ecoformer import InputError
from ecoformer.models.registry import ModelFamily

FAMILY = ModelFamily(
    name="toy",
    variants={"toy_small": ("ecoformer", "msa"), "toy_old": ("sra", "msa")},
    default_model="toy_small",
    released_names={"toy_small_msa": ("toy_small", "msa"), "toy_old": ("toy_old", "msa")},
    foreign_prefixes={"car": "garage"},
)


@pytest.mark.parametrize(
    ("model", "attention", "expected"),
    [
        ("toy_small", None, ("toy_small", "ecoformer")),
        ("toy_small", "msa", ("toy_small", "msa")),
        ("toy_small_msa", None, ("toy_small", "msa")),
        ("toy_small_msa", "ecoformer", ("toy_small", "ecoformer")),
        # A released name may be a variant's, and then says which attention it means.
        ("toy_old", None, ("toy_old", "msa")),
        ("toy_old", "sra", ("toy_old", "sra")),
    ],
)
def test_resolve(model: str, attention: str | None, expected: tuple[str, str]) -> None:
    assert FAMILY.resolve(model, attention) == expected


@pytest.mark.parametrize(
    ("model", "attention", "message"),
    [
        ("toy_smal", None, r"unknown toy model 'toy_smal', did you mean 'toy_small'\?"),
        ("resnet", None, r"unknown toy model 'resnet'\. It has: toy_small, toy_old, toy_small_msa"),
        ("car_small", None, r"'car_small' is a model of garage, .* python -m garage\.main"),
        ("toy_old", "ecoformer", "toy_old has no attention kind 'ecoformer'; it has: sra, msa"),
        ("toy_small_msa", "sra", "toy_small has no attention kind 'sra'; it has: ecoformer, msa"),
    ],
)
def test_unknown_names_are_refused(model: str, attention: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FAMILY.resolve(model, attention)


@pytest.mark.parametrize(
    ("family", "other"), [(pvt.FAMILY, twins.FAMILY), (twins.FAMILY, pvt.FAMILY)]
)
def test_names_of_the_other_family_lead_there(family: ModelFamily, other: ModelFamily) -> None:
    for name in {**other.variants, **other.released_names}:
        with pytest.raises(InputError, match=rf"python -m {other.name}\.main"):
            family.resolve(name)
    # Its own are not taken for the other's.
    for name in {**family.variants, **family.released_names}:
        family.resolve(name)
