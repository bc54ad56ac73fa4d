"""A new kind of attention is one class: models, conversion, cost, tables and plots ask it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import pvt
import twins
from ecoformer import InputError, count_cost, load_checkpoint
from ecoformer.attention import (
    Derived,
    MultiHeadAttention,
    SoftmaxAttention,
    attention_class,
    attention_kinds,
    register_attention,
    registry,
)
from ecoformer.attention.base import Size
from ecoformer.models.registry import find_family
from ecoformer.tools.plots.curves import draw_cost
from ecoformer.tools.tables.ablations import list_arms
from pvt import get_energy

MODELS = ["pvt_v2_b0", "pvt_v2_b2_li", "alt_gvt_small", "pcpvt_small_v0"]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[MultiHeadAttention]]:
    """The kind, for as long as a test runs."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))

    @register_attention("toy")
    class GatedMean(MultiHeadAttention):
        label = "mean of the values, gated"
        cost_note = "Toy attention counts its gate."
        parent = "msa"
        derived: ClassVar = {
            "to_gate": Derived(("qkv",), lambda qkv: qkv.chunk(3)[0], leaves_out=("qkv[k]",)),
            "to_v": Derived(("qkv",), lambda qkv: qkv.chunk(3)[2], leaves_out=("qkv[k]",)),
        }
        own_buffers = ("temperature",)

        def __init__(
            self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0
        ) -> None:
            super().__init__(dim, num_heads)
            self.to_gate = nn.Linear(dim, dim, bias=qkv_bias)
            self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
            self.register_buffer("temperature", torch.tensor(2.0))
            self.add_output(dim, proj_drop)

        def attend(self, x: Tensor, size: Size | None) -> Tensor:
            gate = (self.to_gate(x) / self.temperature).sigmoid()
            return gate * self.to_v(x).mean(1, keepdim=True)

        def count_attention(self, num_tokens: int, size: Size | None = None) -> tuple[int, int]:
            return num_tokens * self.proj.in_features, num_tokens * self.proj.in_features

    yield GatedMean


def kinds_in(model: nn.Module) -> list[str]:
    return [layer.kind for layer in model.modules() if isinstance(layer, MultiHeadAttention)]


def create(variant: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    return find_family(variant).create_model(variant, attention, num_classes=3).eval()


@pytest.mark.parametrize("variant", MODELS)
def test_every_backbone_takes_it_in_the_place_of_ecoformer(variant: str) -> None:
    with torch.device("meta"):
        model = create(variant, "toy")
    kinds = kinds_in(model)
    num_last = {"pvt_v2_b0": 2, "alt_gvt_small": 4}.get(variant, 3)
    assert kinds == ["toy"] * (len(kinds) - num_last) + ["msa"] * num_last
    assert model(torch.empty(2, 3, 64, 96, device="meta")).shape == (2, 3)


def test_a_model_of_it_computes_and_learns() -> None:
    model = create("pvt_v2_b0", "toy")
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_softmax_weights_become_its_own() -> None:
    source, model = create("pvt_v2_b0", "msa").state_dict(), create("pvt_v2_b0", "toy")
    report = load_checkpoint(model, source)
    state, layer = model.state_dict(), "block1.0.attn."
    q, _, v = source[f"{layer}qkv.weight"].chunk(3)
    assert torch.equal(state[f"{layer}to_gate.weight"], q)
    assert torch.equal(state[f"{layer}to_v.weight"], v)
    assert torch.equal(state["block4.1.attn.qkv.bias"], source["block4.1.attn.qkv.bias"])
    assert f"{layer}qkv.weight[k]" in report.dropped
    # Its buffer has no source, and needs none.
    assert (report.missing, report.unused, len(report.derived)) == ((), (), 4 * 6)


def test_original_weights_become_softmax_ones_on_the_way() -> None:
    source, model = create("pvt_v2_b0", "sra").state_dict(), create("pvt_v2_b0", "toy")
    report = load_checkpoint(model, source)
    layer = "block2.1.attn."
    assert torch.equal(model.state_dict()[f"{layer}to_gate.bias"], source[f"{layer}q.bias"])
    assert torch.equal(
        model.state_dict()[f"{layer}to_v.bias"], source[f"{layer}kv.bias"].chunk(2)[1]
    )
    dropped = {f"{layer}{name}.bias" for name in ("sr", "norm")} | {f"{layer}kv.bias[k]"}
    assert {name for name in report.dropped if name.startswith(layer) and "bias" in name} == dropped
    assert (report.missing, report.unused) == ((), ())


def test_its_own_weights_load_strictly() -> None:
    source, model = create("pvt_v2_b0", "toy").state_dict(), create("pvt_v2_b0", "toy")
    assert len(load_checkpoint(model, source, strict=True).loaded) == len(source)


def test_the_cost_table_has_its_row_and_its_note(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", "pvt_v2_b0", "--attn_type", "toy", "--input-size", "64"]
    assert get_energy.main(command) == 0
    out = capsys.readouterr().out
    assert "\n| toy attention " in out and "\n| msa attention " in out
    assert "\nToy attention counts its gate." in out
    counted = count_cost(create("pvt_v2_b0", "toy"), 64).by_kind()["toy attention"]
    num_values = 2 * (16 * 16 * 32 + 8 * 8 * 64 + 4 * 4 * 160)
    assert counted == (num_values, num_values)


@pytest.mark.parametrize("variant", ["pvt_v2_b0", "alt_gvt_small"])
def test_tables_and_plots_know_it(variant: str) -> None:
    arms = {c.attention: c.name for c in list_arms("kinds", variant)}
    assert arms["toy"] == "mean of the values, gated"
    (axes,) = draw_cost(variant, [32]).axes
    assert "mean of the values, gated" in [line.get_label() for line in axes.lines]


def test_a_backbone_lists_it_after_those_that_it_was_published_with() -> None:
    assert pvt.FAMILY.kinds("pvt_v2_b2_li") == ("sra", "toy")
    with pytest.raises(InputError, match="it has: ecoformer, msa, sra, toy"):
        twins.create_model("pcpvt_small_v0", "lsa_msa")


def test_a_kind_that_builds_on_another_is_a_kind_of_its_own() -> None:
    @register_attention("sharp")
    class SharpAttention(SoftmaxAttention):
        pass

    assert (SharpAttention.kind, SharpAttention.label) == ("sharp", "sharp")
    assert "sharp" in pvt.FAMILY.kinds("pvt_v2_b0")
    model = create("pvt_v2_b0", "sharp")
    report = load_checkpoint(model, create("pvt_v2_b0", "sra").state_dict())
    assert "block1.0.attn.qkv.weight" in report.derived
    assert (SoftmaxAttention.kind, SoftmaxAttention.label) == ("msa", "softmax")


def test_a_name_stands_for_one_class(toy: type[MultiHeadAttention]) -> None:
    with pytest.raises(InputError, match=r"'toy' is .*GatedMean already; choose another name"):
        register_attention("toy")(type("Other", (toy,), {}))
    # The cell of a notebook that defines it runs again.
    names = {"__module__": toy.__module__, "__qualname__": toy.__qualname__}
    again = register_attention("toy")(type(toy.__name__, (toy,), names))
    assert attention_class("toy") is again
    assert attention_kinds().count("toy") == 1
