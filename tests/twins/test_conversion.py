"""Weights of one stage in models of the next, entry by entry and by what they compute."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ecoformer import HashConfig, InputError, fit_hash_functions
from ecoformer.checkpoint import load_checkpoint
from tests.backbones import shapes
from tests.checkpoint.weights import fill_state
from tests.twins.tiny import TINY_PCPVT, TINY_SVT
from twins.model import Twins
from twins.variants import TwinsVariant

ORIGINALS = [(TINY_SVT, "lsa_gsa"), (TINY_PCPVT, "sra")]


def make_filled(variant: TwinsVariant, attention: str) -> Twins:
    """A model with weights filled by name."""
    model = Twins(variant, attention).eval()
    model.load_state_dict(fill_state(shapes(model.state_dict())))
    return model


def without_hash(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if ".hash." not in name}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(("variant", "original"), ORIGINALS)
def test_original_to_softmax(variant: TwinsVariant, original: str) -> None:
    source = make_filled(variant, original).state_dict()
    model = Twins(variant, "msa")
    report = load_checkpoint(model, source)

    for name, tensor in model.state_dict().items():
        layer, part, leaf = name.rpartition("qkv.")
        if name not in source:
            assert part
            expected = torch.cat([source[f"{layer}q.{leaf}"], source[f"{layer}kv.{leaf}"]])
        else:
            expected = source[name]
        assert torch.equal(tensor, expected), name
    # Window blocks have qkv already; global ones, of the last stage too, have it made.
    made = {int(name.split(".")[2]) % 2 for name in report.derived}
    assert made == ({1} if original == "lsa_gsa" else {0, 1})
    assert any(name.startswith("blocks.3.") for name in report.derived)
    assert set(report.dropped) == {n for n in source if re.search(r"attn\.(sr|norm)\.", n)}
    assert (report.missing, report.unused) == ((), ())


@pytest.mark.parametrize(("variant", "original"), ORIGINALS)
def test_to_ecoformer_in_two_stages_and_at_once(variant: TwinsVariant, original: str) -> None:
    source = make_filled(variant, original).state_dict()
    hashing = HashConfig(num_bits=4, num_anchors=5, num_fit_steps=2)
    softmax = Twins(variant, "msa")
    staged, composed = (Twins(variant, "ecoformer", hashing=hashing) for _ in range(2))
    load_checkpoint(softmax, source)
    middle = softmax.state_dict()
    load_checkpoint(staged, middle)
    report = load_checkpoint(composed, source)
    assert_equal(without_hash(staged.state_dict()), without_hash(composed.state_dict()))

    for name, tensor in without_hash(staged.state_dict()).items():
        layer, part, leaf = re.fullmatch(r"(.*?)(to_qk\.|to_v\.|)(weight|bias)", name).groups()  # type: ignore[union-attr]
        third = {"to_qk.": 0, "to_v.": 2}.get(part)
        expected = middle[name] if third is None else middle[f"{layer}qkv.{leaf}"].chunk(3)[third]
        assert torch.equal(tensor, expected), name
    assert (report.missing, report.unused) == ((), ())

    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(InputError, match="fit_hash_functions"):
        composed(images)
    fit_hash_functions(composed, images)
    assert composed(images).isfinite().all()


@pytest.mark.parametrize(
    ("variant", "original", "softmax"),
    [(TINY_SVT, "lsa_gsa", "lsa_msa"), (TINY_PCPVT, "sra", "msa")],
)
def test_converted_model_computes_the_same(
    variant: TwinsVariant, original: str, softmax: str
) -> None:
    # Where nothing is reduced, spatial reduction is full attention.
    variant = replace(variant, sr_ratios=(1, 1, 1, 1))
    source = make_filled(variant, original)
    model = Twins(variant, softmax).eval()
    load_checkpoint(model, source.state_dict())
    images = torch.randn(2, 3, 72, 40)
    torch.testing.assert_close(model(images), source(images))
