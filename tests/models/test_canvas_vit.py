"""The small ViT: with every kind, and that attention alone carries anything across a canvas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ecoformer
from ecoformer.attention import MultiHeadAttention, register_attention, registry
from ecoformer.attention.base import Size
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import find_family
from ecoformer.models.vit import CanvasVit
from ecoformer.models.vit_family import FAMILY

KINDS = ("ecoformer", "msa", "msa_share_qk", "sra", "performer")
# Far from each other, and at the same place of a token's window: tokens lie 6 pixels apart.
PLACES = ((12, 12), (36, 30))


def build(kind: str) -> CanvasVit:
    torch.manual_seed(0)
    model = find_family("vit_canvas").create_model("vit_canvas", kind, num_classes=10)
    ready = with_random_hash_functions(model).eval()
    assert isinstance(ready, CanvasVit)
    return ready


def draw_canvas(*places: tuple[int, int]) -> Tensor:
    """The same item of noise at each place of an empty canvas."""
    item = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    canvas = torch.zeros(1, 3, 60, 60)
    for top, left in places:
        canvas[0, :, top : top + 8, left : left + 8] = item
    return canvas


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind in which a token sees itself alone."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))

    @register_attention("removed")
    class OwnValue(MultiHeadAttention):
        def __init__(
            self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0
        ) -> None:
            super().__init__(dim, num_heads)
            self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
            self.add_output(dim, proj_drop)

        def attend(self, x: Tensor, size: Size | None) -> Tensor:
            return self.to_v(x)

        def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
            return 0, 0

    return "removed"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: str) -> None:
    model = build(kind).train()
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(FAMILY.variants["vit_canvas"]) == set(KINDS)


def test_softmax_weights_become_all_that_is_made_of_them() -> None:
    state = build("msa").state_dict()
    for kind in ("ecoformer", "msa_share_qk", "performer"):
        report = ecoformer.load_checkpoint(build(kind), state)
        assert not report.missing and not report.unused


def test_without_attention_two_of_a_class_are_as_one(removed: str) -> None:
    """A classifier of the mean would count them."""
    model = build(removed)
    one, two = (model(draw_canvas(*places)) for places in (PLACES[:1], PLACES))
    torch.testing.assert_close(one, two)
    attending = build("msa")
    assert not torch.allclose(attending(draw_canvas(PLACES[0])), attending(draw_canvas(*PLACES)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_sees_across_the_canvas(kind: str, removed: str) -> None:
    # The first token's window is far from both items.
    def corner(kind: str) -> Tensor:
        model = build(kind)
        return model.forward_features(draw_canvas(*PLACES)) - model.forward_features(draw_canvas())

    assert corner(removed)[0, 0].abs().max() == 0
    assert corner(kind)[0, 0].abs().max() > 1e-4
