"""PyTorch's encoder layers: their masks, their axes, and the fast path that would pass them by."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecoformer
from ecoformer import HashConfig, InputError
from ecoformer.models.conversion import ConvertedAttention
from tests.models.conversion.doubles import assert_wired

HASHING = HashConfig(num_bits=8, num_anchors=6, num_similar=2, num_fit_steps=2)
# True for padding, as PyTorch has it.
PADDING = torch.tensor([[False] * 4 + [True] * 2, [False] * 6, [False] * 2 + [True] * 4])


def build_encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "dim_feedforward": 32, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(16, 2, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=options["batch_first"]).eval()


def draw_tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 6, 16)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": False}, {"norm_first": True}, {"bias": False}]
)
def test_encoders_compute_what_they_did(
    options: dict[str, Any], is_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = draw_tokens()

    def run(model: nn.Module) -> Tensor:
        is_batch_first = options.get("batch_first", True)
        x = tokens if is_batch_first else tokens.transpose(0, 1)
        out = model(x, src_key_padding_mask=PADDING if is_masked else None)
        out = out if is_batch_first else out.transpose(0, 1)
        return out[~PADDING] if is_masked else out

    report = assert_wired(build_encoder(**options), run, monkeypatch)
    assert list(report.converted) == ["layers.0.self_attn", "layers.1.self_attn"]


@pytest.mark.parametrize("names", [["layers.0", "layers.1"], ["layers.1"], ["layers.0"]])
@pytest.mark.parametrize("mask", [None, PADDING])
def test_the_fast_path_does_not_bypass_a_converted_layer(
    names: list[str], mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build_encoder(), draw_tokens()
    ecoformer.convert(model, HASHING, select=names)
    calls: list[nn.Module] = []
    # Not by hooks, which take the fast path away by themselves.
    attend = ConvertedAttention.forward

    def count_call(self: ConvertedAttention, *args: Any, **keywords: Any) -> Any:
        calls.append(self)
        return attend(self, *args, **keywords)

    monkeypatch.setattr(ConvertedAttention, "forward", count_call)
    with torch.no_grad():
        ecoformer.fit_hash_functions(model, {"src": x, "src_key_padding_mask": mask})
        calls.clear()
        out = model(x, src_key_padding_mask=mask)
    assert len(calls) == len(names)
    assert out.shape == x.shape
    # In training there is no such path.
    trained = model.train()(x, src_key_padding_mask=mask)
    is_real = torch.ones_like(PADDING) if mask is None else ~mask
    torch.testing.assert_close(out[is_real], trained[is_real])


def test_an_input_without_a_batch_and_a_mask_for_all_pairs() -> None:
    layer = build_encoder().layers[0]
    model = nn.Sequential(layer)
    ecoformer.convert(model, HASHING)
    x = draw_tokens(1, 9, 16)
    ecoformer.fit_hash_functions(model, x)
    torch.testing.assert_close(model[0](x[0]), model[0](x)[0])
    torch.testing.assert_close(model[0](x, torch.zeros(9, 9)), model[0](x))
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    for hint in (True, False):
        with pytest.raises(InputError, match="hides padding from all tokens"):
            model[0](x, causal, is_causal=hint)


def test_a_padding_mask_of_another_length_is_refused() -> None:
    model, x = build_encoder(), draw_tokens()
    ecoformer.convert(model, HASHING)
    ecoformer.fit_hash_functions(model, x)
    with pytest.raises(InputError, match=r"padding mask \[3, 5\] does not fit 3 inputs of 6"):
        model.layers[0](x, src_key_padding_mask=PADDING[:, :5])


def test_bool_and_float_masks_agree() -> None:
    model, x = build_encoder(), draw_tokens()
    ecoformer.convert(model, HASHING)
    ecoformer.fit_hash_functions(model, {"src": x, "src_key_padding_mask": PADDING})
    additive = torch.zeros(3, 6).masked_fill(PADDING, -torch.inf)
    out = model(x, src_key_padding_mask=additive)
    torch.testing.assert_close(out, model(x, src_key_padding_mask=PADDING))


class Block(nn.Module):
    """Somebody's own block."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        out, weights = self.attn(x, *((x, x) if other is None else (other, other)))
        assert weights is None
        return x + out


def test_attention_outside_of_encoders_has_to_be_named() -> None:
    model = nn.Sequential(Block())
    with pytest.raises(InputError, match=r"first 0\.attn: only its caller knows"):
        ecoformer.convert(model)
    assert ecoformer.convert(model, HASHING, select="0.attn").converted
    x = draw_tokens()
    ecoformer.fit_hash_functions(model, x)
    assert model(x).isfinite().all()
    with pytest.raises(InputError, match="takes one input for queries, keys and values"):
        model[0](x, draw_tokens(3, 5, 16))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 8}, "a width of their own"),
        ({"vdim": 8}, "a width of their own"),
        ({"add_bias_kv": True}, "keys that are no tokens"),
        ({"add_zero_attn": True}, "keys that are no tokens"),
    ],
)
def test_other_attention_is_refused_even_if_named(options: dict[str, Any], reason: str) -> None:
    model = nn.Sequential(Block(**options))
    with pytest.raises(InputError, match=rf"0\.attn cannot be converted: .*{reason}"):
        ecoformer.convert(model, select="0.attn")


def test_a_decoder_keeps_its_attention() -> None:
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    report = ecoformer.convert(model, HASHING)
    assert list(report.converted) == ["encoder.layers.0.self_attn"]
    assert set(report.kept) == {
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    }
    x = draw_tokens()
    ecoformer.fit_hash_functions(model, (x, x))
    assert copy.deepcopy(model)(x, x).isfinite().all()
