"""Layers with a key mask: the result of the real tokens alone, or one line of refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ecoformer import InputError
from ecoformer.attention import LayerSpec, SoftmaxAttention, attention_class, attention_kinds
from ecoformer.attention.base import Size
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.base import Block
from ecoformer.models.mlp import Mlp
from tests.problems import draw, draw_mask

TAKING = ["ecoformer", "msa", "msa_share_qk", "performer"]
REFUSING = ["sra", "lsa"]
SIZE = (4, 5)
X, MASK = draw(3, 20, 12), draw_mask(3, 20)
MASK[1] = False


def build(kind: str) -> nn.Module:
    """A layer of three heads with four channels, float64."""
    torch.manual_seed(0)
    layer = attention_class(kind).from_spec(LayerSpec(12, 3))
    return with_random_hash_functions(layer).double()


def solve(layer: nn.Module, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, and the gradients of its weighted sum at the inputs and the parameters."""
    x = x.detach().requires_grad_()
    out = layer(x, *args)
    parameters = list(layer.parameters())
    grad_x, *grads = torch.autograd.grad((out * draw(*out.shape, seed=7)).sum(), [x, *parameters])
    return out.detach(), grad_x, grads


def test_every_kind_is_here() -> None:
    assert sorted(TAKING + REFUSING) == list(attention_kinds())
    assert {kind for kind in attention_kinds() if attention_class(kind).takes_key_mask} == set(
        TAKING
    )


# Performer's keys share one maximum over the batch, as released: one image here.
@pytest.mark.parametrize("contents", [1.0, float("nan")])
@pytest.mark.parametrize("kind", TAKING)
def test_masked_equals_unpadded(kind: str, contents: float) -> None:
    layer, mask = build(kind), MASK[:1]
    x = X[:1].masked_fill(~mask[..., None], contents)
    out, grad_x, grads = solve(layer, x, None, mask)
    alone = X[:1][mask][None]
    # The same weights of the sum for the same tokens.
    seen = alone.detach().requires_grad_()
    expected = layer(seen)
    weights = draw(*X[:1].shape, seed=7)[mask]
    truth, *truths = torch.autograd.grad((expected[0] * weights).sum(), [seen, *layer.parameters()])
    assert_close(out[mask], expected[0].detach())
    assert_close(grad_x[mask], truth[0])
    assert_close(grads, truths)
    for rows in (out, grad_x):
        assert not rows[~mask].any()


@pytest.mark.parametrize("kind", [kind for kind in TAKING if kind != "performer"])
def test_images_have_as_many_real_tokens_as_they_have(kind: str) -> None:
    layer = build(kind).eval()
    with torch.no_grad():
        out = layer(X, None, MASK)
        for image in (0, 2):
            assert_close(out[image, MASK[image]], layer(X[image, MASK[image]][None])[0])
    assert not out[~MASK].any()


@pytest.mark.parametrize("kind", TAKING)
def test_all_masked_is_zeros_with_zero_gradients(kind: str) -> None:
    out, grad_x, grads = solve(build(kind), X, None, torch.zeros_like(MASK))
    for tensor in (out, grad_x, *grads):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("kind", TAKING)
def test_an_image_without_a_real_token_changes_no_other(kind: str) -> None:
    layer = build(kind)
    out, grad_x, _ = solve(layer, X, None, MASK)
    with torch.no_grad():
        assert_close(out[::2], layer(X[::2], None, MASK[::2]))
    assert out.isfinite().all() and grad_x.isfinite().all()
    assert not out[1].any() and not grad_x[1].any()


@pytest.mark.parametrize("kind", TAKING)
def test_autocast_keeps_masked_rows_out(kind: str) -> None:
    layer = build(kind).float().eval()
    x = X.float().masked_fill(~MASK[..., None], float("nan"))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = layer(x, None, MASK)
        assert out.dtype == torch.bfloat16
    assert out.isfinite().all() and not out[~MASK].any()


@pytest.mark.parametrize("kind", TAKING)
def test_it_compiles_and_exports_with_a_mask(kind: str) -> None:
    layer = build(kind).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (X,), {"key_mask": MASK}).module()
    with torch.no_grad():
        for mask in (MASK, ~MASK):
            expected = layer(X, key_mask=mask)
            assert_close(compiled(X, key_mask=mask), expected)
            assert_close(exported(X, key_mask=mask), expected)


@pytest.mark.parametrize("kind", REFUSING)
def test_kinds_of_maps_refuse_in_one_line(kind: str) -> None:
    with pytest.raises(InputError, match=f"^{kind} attention takes no key_mask: .*map") as raised:
        build(kind)(X, SIZE, MASK)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", TAKING)
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK.double(), r"key_mask is bool, .* not torch\.float64"),
        (MASK[:2], r"\[images, tokens\] = \[3, 20\] here, not \[2, 20\]"),
        (MASK[:, :-1], r"not \[3, 19\]"),
        (MASK[:, None], r"not \[3, 1, 20\]"),
        (MASK.tolist(), "not a list"),
    ],
)
def test_another_mask_is_one_line(kind: str, mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(kind)(X, None, mask)


def test_a_kind_that_builds_on_another_takes_a_mask_where_its_method_does() -> None:
    class Blind(SoftmaxAttention):
        def attend(  # type: ignore[override]
            self, x: Tensor, size: Size | None
        ) -> Tensor:
            return super().attend(x, size)

    class Same(SoftmaxAttention):
        pass

    assert not Blind.takes_key_mask and Same.takes_key_mask
    assert Same(12, 3).double()(X, key_mask=MASK).isfinite().all()
    with pytest.raises(InputError, match="Blind attention takes no key_mask"):
        Blind(12, 3).double()(X, key_mask=MASK)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_block_passes_the_mask_on(is_checkpointed: bool) -> None:
    block = Block(12, build("ecoformer"), Mlp(12, 24)).double().eval()
    block.grad_checkpointing = is_checkpointed
    out, grad_x, _ = solve(block, X, None, MASK)
    for image in (0, 2):
        assert_close(out[image, MASK[image]], block(X[image, MASK[image]][None])[0])
    block.grad_checkpointing = False
    assert_close(solve(block, X, None, MASK)[1], grad_x)
