"""Networks over the maps of any backbone, at any size: what they give, and what they learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from timm.models import metaformer
from torch import Tensor, nn

import ecoformer
from ecoformer.errors import InputError
from ecoformer.models.conversion import convert
from ecoformer.models.dense import RetinaNet, SemanticFpn
from pvt.model import PyramidVisionTransformerV2
from pvt.variants import PVT_VARIANTS, PvtVariant
from tests.tiny import TINY_HASH, draw_images
from twins.model import Twins
from twins.variants import TWINS_VARIANTS, TwinsVariant

VARIANTS: dict[str, PvtVariant | TwinsVariant] = {**PVT_VARIANTS, **TWINS_VARIANTS}
ROWS = [
    (name, kind)
    for name in ("pvt_v2_b0", "pvt_v2_b2_li", "alt_gvt_small", "pcpvt_small_v0")
    for kind in VARIANTS[name].attention_kinds
]
NUM_CLASSES = 5
TARGETS = [
    {"boxes": torch.tensor([[4.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([3])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


def build_body(name: str, kind: str) -> nn.Module:
    """A variant's layout in a few channels, two blocks a stage."""
    variant = replace(
        VARIANTS[name],
        embed_dims=(8, 16, 16, 32),
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 2, 2),
        mlp_ratios=(2, 2, 2, 2),
    )
    if isinstance(variant, PvtVariant):
        return PyramidVisionTransformerV2(variant, kind, hashing=TINY_HASH)
    return Twins(variant, kind, hashing=TINY_HASH)


def detection_loss(model: RetinaNet, images: Tensor) -> Tensor:
    return torch.stack(list(model.loss(model(images), TARGETS).values())).sum()


def segmentation_loss(model: SemanticFpn, images: Tensor) -> Tensor:
    logits = model(images)
    assert logits.shape == (2, NUM_CLASSES, *images.shape[-2:])
    return nn.functional.cross_entropy(logits, torch.ones(logits[:, 0].shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("network", "loss"), [(RetinaNet, detection_loss), (SemanticFpn, segmentation_loss)]
)
@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_every_kind_of_both_backbones_learns_at_odd_sizes(
    name: str, kind: str, network: type[nn.Module], loss: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    model, images = network(build_body(name, kind), NUM_CLASSES), draw_images(2, 67, 93)
    if kind == "ecoformer":
        ecoformer.fit_hash_functions(model, images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    before = loss(model, images)
    before.backward()
    # No weight waits for a gradient that never comes, which ranks would wait for too.
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    with torch.no_grad():
        assert loss(model, images) < before


@pytest.mark.parametrize("network", [RetinaNet, SemanticFpn])
def test_it_takes_a_pyramid_of_timm_that_was_converted(network: type[nn.Module]) -> None:
    mixers: list[type[nn.Module]] = [metaformer.SepConv, metaformer.Attention]
    mixers = [mixer for mixer in mixers for _ in range(2)]
    norms: list[type[nn.Module]] = [metaformer.LayerNorm2dNoBias, metaformer.LayerNormNoBias]
    norms = [norm for norm in norms for _ in range(2)]
    body = metaformer.MetaFormer(
        depths=(1,) * 4, dims=(8, 16, 32, 64), token_mixers=mixers, norm_layers=norms
    )
    convert(body, TINY_HASH)
    model, images = network(body, NUM_CLASSES), draw_images(1, 65, 97)
    assert ecoformer.fit_hash_functions(model, images).keys() == {
        "backbone.body.stages.2.blocks.0.token_mixer.hash",
        "backbone.body.stages.3.blocks.0.token_mixer.hash",
    }
    model(images)


@pytest.mark.parametrize("network", [RetinaNet, SemanticFpn])
@pytest.mark.parametrize("body", [nn.Flatten(), timm.create_model("deit_tiny_patch16_224")])
def test_it_needs_a_pyramid(network: type[nn.Module], body: nn.Module) -> None:
    with pytest.raises(InputError, match=r"takes maps of strides .* --model pvt"):
        network(body, NUM_CLASSES)


def test_the_backbone_says_what_does_not_decay() -> None:
    for network in (RetinaNet, SemanticFpn):
        model = network(build_body("alt_gvt_small", "msa"), NUM_CLASSES)
        names = model.no_weight_decay()
        assert names and names < {name for name, _ in model.named_parameters()}
        assert all(name.startswith("backbone.body.pos_block.") for name in names)


def test_boxes_that_the_network_is_told_come_out() -> None:
    """Outputs that say of the best anchors of each object what is there give back the objects."""
    model = RetinaNet(build_body("pvt_v2_b0", "msa"), NUM_CLASSES)
    outputs = model(draw_images(1, 64, 96))
    boxes = torch.tensor([[3.0, 5.0, 41.0, 37.0], [50.0, 20.0, 90.0, 60.0]])
    labels = torch.tensor([1, 4])
    anchors = model._draw_anchors(outputs)
    assert len(anchors) == outputs["cls_logits"].shape[1]
    outputs["cls_logits"] = torch.full_like(outputs["cls_logits"], -9)
    for box, label in zip(boxes, labels, strict=True):
        place = (anchors - box).abs().sum(-1).argmin()
        [offsets] = model.box_coder.encode([box[None]], [anchors[place, None]])
        outputs["bbox_regression"][0, place] = offsets[0]
        outputs["cls_logits"][0, place, label] = 4 - label
    [found] = model.detect(outputs, [(64, 88)])
    # The surest first, inside of the image that was padded.
    torch.testing.assert_close(found["boxes"], boxes.clamp(max=88))
    torch.testing.assert_close(found["labels"], labels)


def test_anchors_lie_a_stride_apart_whatever_the_size() -> None:
    model = RetinaNet(build_body("pvt_v2_b0", "msa"), NUM_CLASSES)
    for size in ((64, 96), (67, 93)):
        outputs = model(draw_images(1, *size))
        anchors = model._draw_anchors(outputs).unflatten(0, (-1, 9))[:, 0]
        first = 0
        for (height, width), stride in zip(outputs["grids"], (8, 16, 32, 64, 128), strict=True):
            level = anchors[first : first + height * width].unflatten(0, (height, width))
            first += height * width
            moved = level - level[0, 0]
            assert moved[-1, -1, :2].tolist() == [stride * (width - 1), stride * (height - 1)]


@torch.no_grad()
def test_half_precision_moves_no_box() -> None:
    model = RetinaNet(build_body("pvt_v2_b0", "msa"), NUM_CLASSES)
    outputs = model(draw_images(1, 64, 64))
    halves = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in outputs.items()}
    torch.testing.assert_close(model._draw_anchors(outputs), model._draw_anchors(_full(halves)))
    [found] = model.detect(halves, [(64, 64)])
    assert found["boxes"].dtype == torch.float32


def _full(outputs: dict[str, object]) -> dict[str, object]:
    return {k: v.float() if isinstance(v, Tensor) else v for k, v in outputs.items()}


@torch.no_grad()
def test_every_level_has_a_say_in_every_pixel() -> None:
    """Maps of one value each: the sum of what their branches make of them, at a quarter."""
    model = SemanticFpn(build_body("pvt_v2_b0", "msa"), NUM_CLASSES).double()
    sizes = [(17, 24), (9, 12), (5, 6), (3, 3)]
    maps = [torch.zeros(1, 256, *size, dtype=torch.float64) for size in sizes]

    def give() -> Tensor:
        pyramid = {str(level): x for level, x in enumerate(maps)}
        model.backbone.forward = lambda images: pyramid  # type: ignore[method-assign]
        logits: Tensor = model(torch.zeros(1, 3, 67, 93, dtype=torch.float64))
        return logits

    before = give()
    for x in maps:
        x.normal_()
        after = give()
        assert ((after - before).abs() > 1e-6).all()
        before = after
