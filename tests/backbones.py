"""What every backbone is held to: released names and shapes, measured logits and costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecoformer import count_cost
from ecoformer.checkpoint import load_checkpoint
from ecoformer.checkpoint.layout import to_ours, to_released
from ecoformer.models.registry import ModelFamily
from tests.checkpoint.weights import fill_state, released_shapes
from tests.golden.fill import images

GOLDEN = Path(__file__).with_name("golden")


def golden_rows(family: ModelFamily, file: str) -> list[str]:
    """``variant/attention`` of each row that a golden file has for a family."""
    rows = json.loads((GOLDEN / file).read_text())
    return [row for row in rows if row.split("/")[0] in family.variants]


def build(family: ModelFamily, row: str, **keywords: Any) -> nn.Module:
    """The model of a ``variant/attention``, in eval mode."""
    return family.create_model(*row.split("/"), **keywords).eval()


def build_empty(family: ModelFamily, row: str, **keywords: Any) -> nn.Module:
    """The same without data, which takes no time to draw."""
    with torch.device("meta"):
        return build(family, row, **keywords)


def load_filled(family: ModelFamily, row: str) -> nn.Module:
    """A model with the golden weights of its row, hash functions and all."""
    model = build(family, row)
    load_checkpoint(model, fill_state(released_shapes()[row]), strict=True)
    return model


def assert_released_layout(family: ModelFamily, row: str) -> None:
    """Names, shapes and the number of parameters are the released ones, in both directions."""
    model = build_empty(family, row)
    ours = model.state_dict()
    released = released_shapes()[row]
    assert shapes(to_ours({n: torch.empty(s, device="meta") for n, s in released.items()})) == (
        shapes(ours)
    )
    fitted = {n: torch.tensor(True) if n.endswith("is_fitted") else t for n, t in ours.items()}
    assert shapes(to_released(fitted)) == released
    golden = json.loads((GOLDEN / "state_dicts.json").read_text())[row]
    assert sum(parameter.numel() for parameter in model.parameters()) == golden["parameters"]


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def assert_golden_logits(family: ModelFamily, row: str) -> None:
    """Logits are the measured ones to 2e-5."""
    golden = json.loads((GOLDEN / "logits.json").read_text())[row]
    batch = torch.from_numpy(images(golden["seed"], golden["input"]))
    with torch.inference_mode():
        logits = load_filled(family, row)(batch)
    torch.testing.assert_close(logits, torch.tensor(golden["logits"]), rtol=0, atol=2e-5)


def assert_golden_cost(family: ModelFamily, row: str) -> None:
    """Operations, energy and area are the measured ones."""
    golden = json.loads((GOLDEN / "cost.json").read_text())[row]
    cost = count_cost(build_empty(family, row), golden["input_size"])
    assert cost.num_parameters == golden["parameters"]
    for field in ("mul", "add", "energy_pj", "area_um2"):
        assert getattr(cost, field) == golden[field], field
    layers = [layer for layer in cost.layers if not layer.kind.endswith("attention")]
    assert sum(layer.mul for layer in layers) == golden["layers"]
    assert sum(layer.add for layer in layers) == golden["layers"]


def assert_norm_eps(model: nn.Module) -> None:
    """1e-5 in patch embeddings and behind spatial reduction, 1e-6 elsewhere."""
    norms = {n: m.eps for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert norms
    for name, eps in norms.items():
        is_inner = "patch_embed" in name or name.endswith("attn.norm")
        assert eps == (1e-5 if is_inner else 1e-6), name
