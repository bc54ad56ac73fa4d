"""A plain ViT on the parts that pyramids stand on, with any kind of attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from ecoformer import HashConfig, InputError, count_cost, fit_hash_functions, load_checkpoint
from ecoformer.attention import LayerSpec, attention_class, attention_kinds
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.base import Backbone, PatchEmbed, build_blocks, spread_drop_path
from ecoformer.models.mlp import Mlp

HASHING = HashConfig(num_bits=4, num_anchors=5, num_similar=3, num_fit_steps=2)
DIM, DEPTH = 12, 3


class TinyViT(Backbone):
    """8 x 8 patches, blocks of one width, a norm at the end."""

    def __init__(self, kind: str, num_classes: int = 4, drop_path_rate: float = 0.0) -> None:
        super().__init__(DIM, num_classes)
        self.embed = PatchEmbed(3, DIM, kernel_size=8, stride=8)
        spec = LayerSpec(DIM, 3, hashing=HASHING, sr_ratio=2)
        self.blocks = build_blocks(
            (kind,), spec, partial(Mlp, DIM, 4 * DIM), spread_drop_path(drop_path_rate, DEPTH)
        )
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        self.init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        tokens, size = self.embed(x)
        for block in self.blocks:
            tokens = block(tokens, size)
        return self.norm(tokens)


def build(kind: str, **keywords: Any) -> TinyViT:
    torch.manual_seed(0)
    return TinyViT(kind, **keywords)


def build_runnable(kind: str) -> nn.Module:
    return with_random_hash_functions(build(kind)).eval()


IMAGES = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", attention_kinds())
def test_it_runs_and_learns(kind: str) -> None:
    model = build(kind)
    if kind == "ecoformer":
        with pytest.raises(InputError, match="fit_hash_functions"):
            model(IMAGES)
        fits = fit_hash_functions(model, IMAGES)
        assert list(fits) == [f"blocks.{block}.attn.hash" for block in range(DEPTH)]
    logits = model(IMAGES)
    assert logits.shape == (2, 4)
    torch.testing.assert_close(logits, model.head(model.forward_features(IMAGES).mean(1)))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", attention_kinds())
def test_its_cost_is_counted(kind: str) -> None:
    cost = count_cost(build(kind), (48, 40))
    layer = attention_class(kind).from_spec(LayerSpec(DIM, 3, hashing=HASHING, sr_ratio=2))
    mul, add = layer.count_attention(30, (6, 5))
    assert cost.by_kind()[f"{kind} attention"] == (DEPTH * mul, DEPTH * add)


def test_softmax_weights_start_the_ecoformer_one() -> None:
    report = load_checkpoint(build("ecoformer"), build("msa").state_dict())
    assert len(report.derived) == 4 * DEPTH
    assert (report.missing, report.unused) == ((), ())


def test_timm_s_methods_are_there() -> None:
    model = build("msa", drop_path_rate=0.5)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert torch.equal(model.eval()(IMAGES), model.forward_features(IMAGES).mean(1))
    assert model.no_weight_decay() == set()
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks.children()]
    assert rates == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("kind", attention_kinds())
def test_it_compiles_as_one_graph_and_exports(kind: str) -> None:
    model = build_runnable(kind)
    expected = model(IMAGES)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(IMAGES), expected)
    assert counter.frame_count == 1
    exported = torch.export.export(model, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), expected)
