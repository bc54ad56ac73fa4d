"""The cost model: released integers, somebody's own model, and a model that is not touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from ecoformer import EcoFormerAttention, InputError, convert, count_cost, fit_hash_functions
from ecoformer.attention import SpatialReductionAttention
from ecoformer.cost import Cost, LayerCost
from pvt import FAMILY
from tests.backbones import assert_golden_cost, build_empty, golden_rows
from tests.tiny import TINY_HASH, TinyModel, draw_images


class FoldedAttention(nn.Module):
    """Attention of two halves of an image, folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = EcoFormerAttention(3, 1, hashing=TINY_HASH)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] to [2 * B, N / 2, 3]."""
        return self.attn(images.flatten(2).mT.reshape(2 * len(images), -1, 3))


class KeywordAttention(nn.Module):
    """Attention whose map's size is passed by name."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = SpatialReductionAttention(3, 1, sr_ratio=2)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] to [B, N, 3]."""
        return self.attn(images.flatten(2).mT, size=images.shape[2:])


def count_codes(tokens: int, heads: int, dim: int) -> tuple[int, int]:
    """Multiplications and additions of attention over codes of ``TINY_HASH``, by hand."""
    bits, anchors = 4, 6
    mul = 2 * anchors + anchors * bits + bits + 1 + dim
    add = 2 * anchors * dim + anchors * bits + 2 * bits + 2 * bits * dim + dim
    return heads * tokens * mul, heads * tokens * add


def kinds_of(cost: Cost, name: str) -> list[str]:
    return [layer.kind for layer in cost.layers if layer.name == name]


@pytest.mark.parametrize("row", golden_rows(FAMILY, "cost.json"))
def test_operations_are_the_released_ones(row: str) -> None:
    assert_golden_cost(FAMILY, row)


def test_a_model_of_ones_own_by_hand() -> None:
    model, height, width = TinyModel(depth=1), 8, 12
    tokens = 2 * 3
    attention = count_codes(tokens, heads=2, dim=4)
    attention_mul, attention_add = attention
    convolution = tokens * 8 * (4 * 4 * 3 + 1)
    linear = tokens * (3 * 8 * 8 + 2 * 8 * 16) + 8 * 5
    norm = 3 * 2 * tokens * 8
    cost = count_cost(model, (height, width))
    assert cost.by_kind() == {
        "convolution": (convolution, convolution),
        "normalisation": (norm, norm),
        "linear": (linear, linear),
        "ecoformer attention": attention,
    }
    assert cost.mul == convolution + linear + norm + attention_mul
    assert cost.add == convolution + linear + norm + attention_add
    assert cost.energy_pj == pytest.approx(3.7 * cost.mul + 0.9 * cost.add)
    assert cost.area_um2 == 7700 * cost.mul + 4184 * cost.add
    assert cost.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.input_size == (height, width)


def test_layers_come_in_the_order_in_which_they_run() -> None:
    names = [layer.name for layer in count_cost(TinyModel(depth=1), 8).layers]
    assert names == [
        *("embed.proj", "embed.norm", "blocks.0.norm1"),
        *("blocks.0.attn.to_qk", "blocks.0.attn.to_v", "blocks.0.attn.proj", "blocks.0.attn"),
        *("blocks.0.norm2", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"),
    ]


def test_attention_kinds_are_told_apart() -> None:
    cost = count_cost(build_empty(FAMILY, "pvt_v2_b0/ecoformer"), 64)
    assert kinds_of(cost, "block3.0.attn") == ["ecoformer attention"]
    assert kinds_of(cost, "block4.0.attn") == ["msa attention"]


def test_sides_of_an_image_are_height_and_width() -> None:
    model = build_empty(FAMILY, "pvt_v2_b0/sra")
    square, wide, high = (count_cost(model, size) for size in (64, (64, 128), (128, 64)))
    assert square.layers == count_cost(model, (64, 64)).layers
    assert (wide.mul, wide.add) == (high.mul, high.add)
    assert wide.mul > 2 * square.mul - 1e6


def test_attention_of_a_folded_batch_counts_as_often_as_it_runs() -> None:
    folded = {layer.name: layer for layer in count_cost(FoldedAttention(), (4, 6)).layers}
    model = EcoFormerAttention(3, 1, hashing=TINY_HASH)
    mul, add = model.count_attention(12)
    assert (folded["attn"].mul, folded["attn"].add) == (2 * mul, 2 * add)


def test_a_size_may_be_passed_by_name() -> None:
    model = KeywordAttention()
    expected = model.attn.count_attention(48, (6, 8))
    (layer,) = (layer for layer in count_cost(model, (6, 8)).layers if layer.name == "attn")
    assert (layer.mul, layer.add) == expected


@pytest.mark.parametrize("is_training", [False, True])
def test_the_model_is_not_touched(is_training: bool) -> None:
    model = TinyModel().train(is_training)
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    random_state = torch.get_rng_state()
    count_cost(model, 16)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(module.training == is_training for module in model.modules())
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())


def test_a_fit_changes_no_cost() -> None:
    model = TinyModel()
    unfitted = count_cost(model, 16)
    fit_hash_functions(model, draw_images())
    assert count_cost(model, 16) == unfitted


def test_models_for_images_of_one_channel() -> None:
    model = nn.Conv2d(1, 2, kernel_size=3)
    assert count_cost(model, 5).mul == 3 * 3 * 2 * (3 * 3 + 1)


def test_a_model_of_tokens_is_told_what_a_cost_is_of() -> None:
    model = nn.Sequential(nn.Linear(48, 64), EcoFormerAttention(64, 2))
    with pytest.raises(InputError, match=r"an image \[1, 3, 224, 224\]"):
        count_cost(model)


def test_one_image_is_enough_in_training_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, kernel_size=8), nn.BatchNorm2d(4)).train()
    assert count_cost(model, 8).mul == 4 * (8 * 8 * 3 + 1)


def create_vit(*, is_fused: bool = True) -> Any:
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_classes=5
    )
    for block in model.blocks:
        block.attn.fused_attn = is_fused
    return model


@pytest.mark.parametrize("is_fused", [True, False])
def test_softmax_of_somebody_elses_class(is_fused: bool) -> None:
    tokens, dim, heads = 2 * 2 + 1, 24, 3
    cost = count_cost(create_vit(is_fused=is_fused), 32)
    products = 2 * tokens**2 * dim
    attention = [layer for layer in cost.layers if layer.kind == "msa attention"]
    assert [layer.name for layer in attention] == ["blocks.0.attn", "blocks.1.attn"]
    for layer in attention:
        assert (layer.mul, layer.add) == (products + heads * tokens**2, products)
        assert layer.num_map_values == heads * tokens**2
        assert layer.num_values == 3 * tokens * dim + tokens * dim
    linear = tokens * 2 * (3 * dim**2 + dim**2 + 2 * 4 * dim**2) + dim * 5
    assert cost.by_kind()["linear"] == (linear, linear)
    # The scale, biases and positions are no products.
    assert set(cost.by_kind()) == {"convolution", "normalisation", "linear", "msa attention"}


def test_what_is_converted_tells_its_own_cost() -> None:
    model = create_vit()
    convert(model, TINY_HASH)
    layer = EcoFormerAttention(24, 3, hashing=TINY_HASH)
    mul, add = layer.count_attention(5)
    assert count_cost(model, 32).by_kind()["ecoformer attention"] == (2 * mul, 2 * add)


def list_converted(model: nn.Module, size: int | tuple[int, int]) -> list[LayerCost]:
    """Convert a model, and list what its attention costs."""
    convert(model, TINY_HASH)
    return [one for one in count_cost(model, size).layers if one.kind == "ecoformer attention"]


def expect_converted(name: str, tokens: int, heads: int, dim: int) -> LayerCost:
    bits, anchors = 4, 6
    functions = heads * (bits * anchors + anchors + anchors * dim)
    # Queries and values are read, and what the heads found is written.
    values = 3 * tokens * heads * dim
    mul, add = count_codes(tokens, heads, dim)
    return LayerCost(name, "ecoformer attention", mul, add, functions, values)


@pytest.mark.parametrize("is_channels_first", [False, True])
def test_tokens_of_a_map_are_its_pixels(is_channels_first: bool) -> None:
    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 24, kernel_size=4, stride=4)
            self.attn = (
                timm.models.fastvit.Attention(24, head_dim=8)
                if is_channels_first
                else timm.models.volo.Attention(24, num_heads=3)
            )

        def forward(self, images: Tensor) -> Tensor:
            x = self.patch(images)
            return self.attn(x if is_channels_first else x.movedim(1, 3))

    # 4 x 5 patches, for 24 channels in 3 heads.
    assert list_converted(Map(), (16, 20)) == [expect_converted("attn", tokens=20, heads=3, dim=8)]


def test_convolutions_may_project_a_map() -> None:
    model = timm.create_model("visformer_tiny", img_size=64)
    counted = [(one.mul, one.add) for one in list_converted(model, 64)]
    # 3 heads of 4 x 4 tokens, then of 2 x 2.
    assert counted == 4 * [count_codes(16, 3, 64)] + 4 * [count_codes(4, 3, 128)]


def test_attention_may_return_more_than_a_tensor() -> None:
    model = VisionTransformer(32, 16, 2, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=5)
    names = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    expected = [expect_converted(name, tokens=2 * 2 + 1, heads=3, dim=8) for name in names]
    assert list_converted(model, 32) == expected


def test_softmax_in_windows_counts_the_pairs_that_it_sees() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1,), num_heads=(2,)
    )
    # Four windows of 4 x 4 tokens of 96 channels.
    products = 4 * 2 * 16**2 * 96
    kinds = count_cost(model, 32).by_kind()
    assert kinds["msa attention"] == (products + 4 * 2 * 16**2, products)
    assert "products" not in kinds


def test_weights_that_are_no_module_of_their_own_are_counted() -> None:
    """A layer of PyTorch's and one that adds a bias of its own, against the same with modules."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 16, 16)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.tail = nn.Parameter(torch.zeros(4, 8))

        def forward(self, image: Tensor) -> Tensor:
            x = self.patch(image).flatten(2).mT
            x, _ = self.attn(x, x, x, need_weights=False)
            return nn.functional.linear(x, weight=self.tail)

    layers = {
        layer.kind: layer for layer in count_cost(Bare(), 64).layers if layer.kind != "linear"
    }
    bare = [layer for layer in count_cost(Bare(), 64).layers if layer.kind == "linear"]
    # 16 tokens of 8 channels: four projections of 64 weights; then one of 32.
    assert [(one.mul, one.num_weights, one.num_values) for one in bare] == [
        (4 * 16 * 64, 4 * 64, 4 * 2 * 16 * 8),
        (16 * 32, 32, 16 * 8 + 16 * 4),
    ]
    attention = layers["msa attention"]
    assert (attention.mul, attention.add) == (2 * 16**2 * 8 + 2 * 16**2, 2 * 16**2 * 8)
