"""Models of transformers, built small and without weights: wiring, masks of padding, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecoformer
from ecoformer import HashConfig, InputError
from tests.models.conversion.doubles import assert_wired

transformers = pytest.importorskip("transformers")

HASHING = HashConfig(num_bits=4, num_anchors=5, num_similar=2, num_fit_steps=2)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32}
VISION = {**SMALL, "image_size": 16, "patch_size": 4}
TEXT = {**SMALL, "vocab_size": 20, "hidden_dropout_prob": 0.0, "max_position_embeddings": 24}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(2, 20, (3, 7), generator=torch.Generator().manual_seed(0))
LENGTHS = (7, 5, 6)
MASK = torch.tensor([[1] * n + [0] * (7 - n) for n in LENGTHS])

VISION_MODELS = {
    "ViT": VISION,
    "DeiT": VISION,
    "Dinov2": VISION,
    "Dinov2WithRegisters": VISION,
    "CLIPVision": VISION,
    "SiglipVision": VISION,
    "DINOv3ViT": VISION,
}
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "Bert": TEXT,
    "Roberta": {**TEXT, "pad_token_id": 1},
    "Electra": {**TEXT, "embedding_size": 16},
    "XLMRoberta": {**TEXT, "pad_token_id": 1},
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 20},
}


def build(name: str, settings: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}Model")._from_config(config, **options).eval()


@pytest.mark.parametrize("name", VISION_MODELS)
def test_vision_models_compute_what_they_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: nn.Module) -> Tensor:
        out: Tensor = model(IMAGES).last_hidden_state
        return out

    report = assert_wired(build(name, VISION_MODELS[name]), run, monkeypatch)
    assert len(report.converted) == 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_models_compute_what_they_did(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(model: nn.Module) -> Tensor:
        out: Tensor = model(TOKENS, attention_mask=MASK).last_hidden_state
        return out[MASK.bool()]

    model = build(name, TEXT_MODELS[name], attn_implementation=implementation)
    report = assert_wired(model, run, monkeypatch)
    assert len(report.converted) == 2 and not report.kept


def test_padding_changes_nothing() -> None:
    model = build("Bert", TEXT)
    ecoformer.convert(model, HASHING)
    ecoformer.fit_hash_functions(model, {"input_ids": TOKENS, "attention_mask": MASK})
    padded = model(TOKENS, attention_mask=MASK).last_hidden_state
    for row, length in enumerate(LENGTHS):
        alone = model(TOKENS[row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(padded[row : row + 1, :length], alone)


def test_converted_weights_of_a_checkpoint_are_taken() -> None:
    for name, settings in (("ViT", VISION), ("Bert", TEXT)):
        model, original = build(name, settings), build(name, settings)
        ecoformer.convert(model, HASHING)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        report = ecoformer.load_checkpoint(model, original.state_dict())
        assert not (report.missing or report.unused)
        values = next(p for n, p in original.named_parameters() if ".v" in n)
        assert any(torch.equal(p, values) for n, p in model.named_parameters() if "to_v" in n)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("Bert", {**TEXT, "is_decoder": True}, "it is causal"),
        ("CLIPText", {**SMALL, "vocab_size": 20, "eos_token_id": 2, "bos_token_id": 1}, "causal"),
        ("Albert", {**TEXT, "embedding_size": 8}, "called again and again"),
        ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20}, "no adapter knows"),
    ],
)
def test_what_has_no_linear_form_is_refused(
    name: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        ecoformer.convert(build(name, settings))


def test_a_causal_mask_is_refused() -> None:
    model = build("Bert", TEXT)
    ecoformer.convert(model, HASHING)
    ecoformer.fit_hash_functions(model, TOKENS)
    with pytest.raises(InputError, match="hides padding from all tokens"):
        model(TOKENS, attention_mask=torch.ones(3, 1, 7, 7).tril().bool())
