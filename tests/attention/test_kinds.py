"""What every kind of attention has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ecoformer import InputError
from ecoformer.attention import LayerSpec, SoftmaxAttention, attention_class, attention_kinds
from ecoformer.hashing import with_random_hash_functions
from tests.problems import draw

KINDS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in attention_kinds()},
    "sra, reduced": {"kind": "sra", "sr_ratio": 2},
    "sra, linear": {"kind": "sra", "is_linear": True},
}
# Outputs of the projections of 12 channels, by the names that released weights have.
PROJECTIONS = {
    "ecoformer": {"to_qk": 12, "to_v": 12, "proj": 12},
    "msa": {"qkv": 36, "proj": 12},
    "msa_share_qk": {"to_qk": 12, "to_v": 12, "proj": 12},
    "sra": {"q": 12, "kv": 24, "proj": 12},
    "lsa": {"qkv": 36, "proj": 12},
    "performer": {"qkv": 36, "proj": 12},
}


def build(options: dict[str, Any], num_heads: int = 3, **more: Any) -> nn.Module:
    """A layer of 12 channels that runs in eval mode, fitted or not."""
    torch.manual_seed(0)
    settings = {key: value for key, value in options.items() if key != "kind"} | more
    layer = attention_class(options["kind"]).from_spec(LayerSpec(12, num_heads, **settings))
    return with_random_hash_functions(layer).eval()


def run(layer: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    with torch.no_grad():
        return layer(x, size)


@pytest.fixture(params=KINDS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


@pytest.mark.parametrize("size", [(5, 9), (9, 5), (7, 7), (2, 2)])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_tokens_in_tokens_out(
    num_heads: int, size: tuple[int, int], options: dict[str, Any]
) -> None:
    x = draw(2, size[0] * size[1], 12).float()
    out = run(build(options, num_heads), x, size)
    assert out.shape == x.shape
    assert out.isfinite().all()


# Not Performer: as released, its keys share one maximum over the batch.
@pytest.mark.parametrize("name", [name for name in KINDS if name != "performer"])
def test_images_do_not_see_each_other(name: str) -> None:
    layer, x = build(KINDS[name]), draw(3, 35, 12).float()
    alone = torch.cat([run(layer, image, (5, 7)) for image in x.split(1)])
    torch.testing.assert_close(run(layer, x, (5, 7)), alone)


def test_gradients_reach_every_parameter(options: dict[str, Any]) -> None:
    layer = build(options)
    x = draw(2, 35, 12).float().requires_grad_()
    layer(x, (5, 7)).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_double_precision_stays(options: dict[str, Any]) -> None:
    layer, x = build(options), draw(1, 35, 12)
    out = run(layer.double(), x, (5, 7))
    assert out.dtype == torch.float64
    torch.testing.assert_close(
        run(build(options), x.float(), (5, 7)).double(), out, rtol=0, atol=1e-5
    )


def test_autocast_gives_half_precision_near_the_truth(options: dict[str, Any]) -> None:
    layer, x = build(options), draw(2, 35, 12).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = run(layer, x, (5, 7))
    assert out.dtype == torch.bfloat16
    # Codes may flip with the projection that they come from, so the mean error counts.
    assert (out.float() - run(layer, x, (5, 7))).abs().mean() < 0.02


def test_projections_may_lack_a_bias_but_the_last_one_has_it(options: dict[str, Any]) -> None:
    kind, settings = options["kind"], {k: v for k, v in options.items() if k != "kind"}
    attention: Callable[..., nn.Module] = attention_class(kind)
    bare = attention(12, 3, qkv_bias=False, **settings)
    layer = with_random_hash_functions(bare).eval()
    biased = {
        name for name, m in layer.named_modules() if isinstance(m, nn.Linear) and m.bias is not None
    }
    assert biased == {"proj"}
    assert run(layer, draw(1, 35, 12).float(), (5, 7)).isfinite().all()


def test_dropout_follows_the_output_projection(options: dict[str, Any]) -> None:
    layer, x = build(options, proj_drop=0.5), draw(2, 35, 12).float()
    torch.manual_seed(0)
    out = run(layer.train(), x, (5, 7))
    kept = out != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(out[kept] / 2, run(layer.eval(), x, (5, 7))[kept])


@pytest.mark.parametrize("kind", attention_kinds())
def test_parameters_are_named_as_released(kind: str) -> None:
    layer = build({"kind": kind})
    expected = {
        f"{name}.{leaf}": shape
        for name, out in PROJECTIONS[kind].items()
        for leaf, shape in (("weight", (out, 12)), ("bias", (out,)))
    }
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected


@pytest.mark.parametrize("num_heads", [0, 5])
@pytest.mark.parametrize("kind", attention_kinds())
def test_heads_that_do_not_divide_the_channels_are_refused(kind: str, num_heads: int) -> None:
    with pytest.raises(InputError, match=f"{num_heads} heads cannot share 12 channels"):
        attention_class(kind).from_spec(LayerSpec(12, num_heads))


def test_a_head_is_a_view_of_contiguous_channels() -> None:
    layer, x = SoftmaxAttention(12, 3), torch.arange(2 * 5 * 12).view(2, 5, 12)
    (heads,) = layer.split_heads(x)
    assert torch.equal(heads[:, 1], x[:, :, 4:8])
    assert heads.data_ptr() == x.data_ptr()


def test_an_unknown_kind_shows_the_nearest_and_all() -> None:
    with pytest.raises(
        InputError, match=r"'ecofomer', did you mean 'ecoformer'\? There are: .*msa"
    ):
        attention_class("ecofomer")


@pytest.mark.parametrize("second", [torch.ones(2, 12, dtype=torch.bool), torch.zeros(2, 12, 12), 3])
def test_what_is_no_size_is_refused(second: Any, options: dict[str, Any]) -> None:
    layer, x = build(options), draw(2, 12, 12).float()
    with pytest.raises(
        InputError, match=r"takes the map's \(height, width\), not a .*its one mask is key_mask"
    ):
        layer(x, second)


def test_masks_of_nothing_are_accepted_and_others_refused(options: dict[str, Any]) -> None:
    layer, x = build(options), draw(2, 12, 12).float()
    with torch.no_grad():
        assert torch.equal(layer(x, (3, 4), attn_mask=None, is_causal=False), run(layer, x, (3, 4)))
    for keywords in ({"attn_mask": torch.ones(12, 12)}, {"is_causal": True}):
        with pytest.raises(InputError, match="no attn_mask and is never causal"):
            layer(x, (3, 4), **keywords)


def test_a_block_of_timm_calls_it() -> None:
    block = Block(12, 3)
    block.attn = build({"kind": "ecoformer"})
    assert block(draw(2, 12, 12).float()).shape == (2, 12, 12)
