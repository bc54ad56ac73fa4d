"""What timm asks of any of its models, asked of ours: each attention kind of each backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from timm.models import create_feature_extractor, get_graph_node_names, group_parameters
from timm.models.pvt_v2 import checkpoint_filter_fn
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pvt
import twins
from ecoformer import InputError
from ecoformer.config import parse_config
from ecoformer.engine.session import create_model, create_task
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.base import Block
from ecoformer.models.pyramid import Pyramid
from ecoformer.models.registry import ModelFamily

B0, SVT, PCPVT = "ecoformer_pvt_v2_b0", "ecoformer_twins_svt_small", "ecoformer_twins_pcpvt_small"
CASES = [
    *((B0, kind) for kind in pvt.FAMILY.variants["pvt_v2_b0"]),
    *((SVT, kind) for kind in ("ecoformer", "lsa_msa", "lsa_gsa")),
    (PCPVT, "sra"),
]
# One of each backbone, where the kind of attention can make no difference.
BACKBONES = [(B0, "ecoformer"), (SVT, "lsa_gsa")]
each_case = pytest.mark.parametrize(("name", "kind"), CASES)
each_backbone = pytest.mark.parametrize(("name", "kind"), BACKBONES)


def create(name: str, **options: Any) -> Any:
    """``timm.create_model``, which tells no type of what the name stands for."""
    return timm.create_model(name, **options)


@cache
def _build_once(name: str, kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return with_random_hash_functions(create(name, attention=kind, num_classes=7, **options))


@pytest.fixture(scope="module", autouse=True)
def forget_models() -> Iterator[None]:
    """Half a gigabyte."""
    yield
    _build_once.cache_clear()


def build(name: str, kind: str, **options: Any) -> Pyramid:
    """A model by its timm name, as if fitted, in eval mode."""
    model = copy.deepcopy(_build_once(name, kind, **options)).eval()
    assert isinstance(model, Pyramid)
    return model


def draw_images(count: int = 2, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def find_gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Name to gradient of one seeded step in train mode."""
    torch.manual_seed(1)
    model.zero_grad()
    model.train()(images).square().sum().backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@each_case
def test_forward_backward_and_checkpointing(name: str, kind: str) -> None:
    images = draw_images()
    model = build(name, kind, drop_path_rate=0.4, drop_rate=0.2, proj_drop_rate=0.1)
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    gradients = find_gradients(model, images)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.norm1.register_forward_hook(count)
    model.set_grad_checkpointing()
    torch.testing.assert_close(find_gradients(model, images), gradients, rtol=0, atol=0)
    assert num_calls == 2 * len(blocks)
    num_calls = 0
    with torch.no_grad():
        assert torch.equal(model.eval()(images), logits)
    assert num_calls == len(blocks)
    model.set_grad_checkpointing(False)
    find_gradients(model, images)
    assert num_calls == 2 * len(blocks)


@pytest.mark.usefixtures("one_rank")
def test_checkpointing_under_distributed_data_parallel() -> None:
    images = draw_images()
    model = build(B0, "ecoformer", drop_path_rate=0.4)
    expected = find_gradients(model, images)
    model.set_grad_checkpointing()
    network = DistributedDataParallel(model)
    for _ in range(2):
        torch.testing.assert_close(find_gradients(network, images), expected)


@each_backbone
def test_default_configuration_names_what_there_is(name: str, kind: str) -> None:
    model: Any = build(name, kind)
    config = model.default_cfg
    assert model.num_features == model.head_hidden_size > 0
    assert model.in_chans == config["input_size"][0] == 3
    for entry in ("first_conv", "classifier"):
        assert f"{config[entry]}.weight" in model.state_dict()
    assert model.get_submodule(config["first_conv"]).in_channels == 3
    side = config["input_size"][1]
    with torch.no_grad():
        features = model.forward_features(draw_images(1, side))
    assert features.shape == (1, model.num_features, *config["pool_size"])


@each_backbone
def test_classifier_and_pooling_can_go(name: str, kind: str) -> None:
    model, images = build(name, kind), draw_images()
    with torch.no_grad():
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
        assert features.shape == (2, model.num_features, 2, 2)
        assert pooled.shape == (2, model.head_hidden_size)
        model.reset_classifier(0)
        assert torch.equal(model(images), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(images), features)
        # None leaves it as it is, and a map has no classifier.
        model.reset_classifier(3)
        assert torch.equal(model.forward_head(features, pre_logits=True), features)
        with pytest.raises(InputError, match="set global_pool='avg'"):
            model(images)
        model.reset_classifier(3, "avg")
        assert model(images).shape == (2, 3)
        with pytest.raises(InputError, match="global_pool is 'avg' or '', not 'max'"):
            model.reset_classifier(3, "max")


def test_pooling_is_chosen_where_a_model_is_created() -> None:
    model = create(B0, attention="sra", num_classes=0, global_pool="")
    assert model(draw_images()).shape == (2, 256, 2, 2)


def test_a_new_classifier_keeps_dtype_device_and_mode() -> None:
    with torch.device("meta"):
        model = create(B0, dtype=torch.bfloat16).eval()
    model.reset_classifier(5)
    assert (model.head.weight.dtype, model.head.weight.device.type) == (torch.bfloat16, "meta")
    assert not model.head.training


def test_models_are_created_in_a_dtype_and_on_a_device() -> None:
    on_meta = create(B0, device="meta")
    assert {tensor.device.type for tensor in on_meta.state_dict().values()} == {"meta"}
    model = create(B0, attention="sra", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(draw_images().bfloat16()).dtype == torch.bfloat16
    # Of one seed, in any dtype.
    torch.manual_seed(3)
    low = create(B0, dtype=torch.bfloat16).state_dict()
    torch.manual_seed(3)
    full = create(B0).state_dict()
    assert all(torch.equal(low[name], full[name].to(low[name].dtype)) for name in full)


def test_dropout_is_where_timm_says() -> None:
    def find(**rates: float) -> dict[str, float]:
        with torch.device("meta"):
            model = create(SVT, **rates)
        layers = model.named_modules()
        return {name: m.p for name, m in layers if isinstance(m, nn.Dropout) and m.p}

    assert find(drop_rate=0.3) == {"head_drop": 0.3}
    assert find(pos_drop_rate=0.3) == {"pos_drop": 0.3}
    inner = find(proj_drop_rate=0.3)
    assert {name.split(".", 3)[3] for name in inner} == {"attn.proj_drop", "mlp.drop"}
    assert len(inner) == 2 * 18
    model = create(B0, attention="sra", num_classes=0, drop_rate=0.5).train()
    share = (model(draw_images()) == 0).float().mean()
    assert 0.3 < share < 0.7


@pytest.mark.parametrize(
    ("family", "model"),
    [(pvt.FAMILY, "pvt_v2_b0"), (twins.FAMILY, "alt_gvt_small_ecoformer")],
)
def test_the_released_drop_is_that_of_the_backbone(family: ModelFamily, model: str) -> None:
    config = parse_config(["--model", model, "--drop", "0.25", "--data-set", "DIGITS"], family)
    with torch.device("meta"):
        network = create_model(config, create_task(config), family)
    rates = {name: m.p for name, m in network.named_modules() if isinstance(m, nn.Dropout)}
    assert {name for name, rate in rates.items() if not rate} == {"head_drop"}
    assert set(rates.values()) == {0, 0.25}


@pytest.mark.parametrize("coarse", [False, True])
def test_parameters_are_grouped_as_timm_groups_them(coarse: bool) -> None:
    with torch.device("meta"):
        ours = [create(B0, attention="sra"), create(SVT, attention="lsa_gsa")]
        theirs = [create("pvt_v2_b0"), create("twins_svt_small")]
    for one, other in zip(ours, theirs, strict=True):
        groups, expected = (
            group_parameters(m, m.group_matcher(coarse=coarse), reverse=True) for m in (one, other)
        )
        names = {name: name for name in groups}
        if one is ours[0]:
            names = {old: new for new, old in checkpoint_filter_fn(names, other).items()}
        assert {names[name]: group for name, group in groups.items()} == expected


@each_case
def test_every_parameter_has_a_group(name: str, kind: str) -> None:
    with torch.device("meta"):
        model: Any = create(name, attention=kind)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    # What nothing matches is taken for the head.
    last = max(groups.values())
    assert {n for n, g in groups.items() if g == last} == {"head.weight", "head.bias"}


def test_the_stem_learns_as_slowly_as_timm_s() -> None:
    with torch.device("meta"):
        groups = param_groups_layer_decay(create(B0), layer_decay=0.75)
    scales = {group["lr_scale"] for group in groups}
    assert scales == {0.75**depth for depth in range(6)}
    assert min(scales) == pytest.approx(0.237, abs=5e-4)


@each_backbone
def test_features_of_two_stages_keep_no_more(name: str, kind: str, one_rank: None) -> None:
    whole, images = build(name, kind), draw_images()
    model: Any = copy.deepcopy(whole)
    assert model.prune_intermediate_layers((0, -3)) == [0, 1]
    stages = ("patch_embed3", "block3", "norm3", "patch_embeds.2", "blocks.2", "pos_block.2")
    last = ("patch_embed4", "block4", "norm4", "patch_embeds.3", "blocks.3", "pos_block.3")
    gone = {
        n for n, _ in whole.named_parameters() if n.startswith((*stages, *last, "norm.", "head."))
    }
    assert {n for n, _ in model.named_parameters()} == (
        {n for n, _ in whole.named_parameters()} - gone
    )
    assert model.num_features == model.head_hidden_size == model.feature_info[1]["num_chs"]
    with torch.no_grad():
        _, maps = whole.forward_intermediates(images, (0, 1))
        features = model(images)
        assert torch.equal(features, maps[1])
        assert torch.equal(model.forward_features(images), features)
    # A parameter without a gradient would stop the second step.
    network = DistributedDataParallel(model)
    for _ in range(2):
        find_gradients(network, images)


def test_features_only_keeps_what_its_stages_need() -> None:
    features = create(B0, features_only=True, out_indices=(0, 1))
    assert sum(p.numel() for p in features.parameters()) < 0.3e6
    assert len(features.feature_info.channels()) == 2


def test_pruning_can_leave_the_head() -> None:
    model: Any = build(B0, "sra")
    assert model.prune_intermediate_layers(4, prune_head=False) == [0, 1, 2, 3]
    assert model(draw_images()).shape == (2, 7)
    with pytest.raises(InputError, match="those of 4 stages"):
        model.prune_intermediate_layers([4])


@each_backbone
def test_intermediates_can_stop_early(name: str, kind: str) -> None:
    model, images = build(name, kind), draw_images()
    with torch.no_grad():
        whole, all_maps = model.forward_intermediates(images)
        early, maps = model.forward_intermediates(images, (0, 1), False, True)
    assert torch.equal(whole, all_maps[-1])
    assert torch.equal(early, all_maps[1])
    torch.testing.assert_close(maps, all_maps[:2], rtol=0, atol=0)


@each_backbone
@pytest.mark.parametrize("feature_cls", [None, "getter", "list", "hook", "fx", "dict"])
def test_features_come_as_maps_by_every_way(name: str, kind: str, feature_cls: str | None) -> None:
    whole, images = build(name, kind), draw_images()
    options = {} if feature_cls is None else {"feature_cls": feature_cls}
    model = create(name, attention=kind, features_only=True, out_indices=(1, 3), **options).eval()
    weights = whole.state_dict()
    inner = {n: t for m in model.children() for n, t in m.state_dict().items()}
    assert inner.keys() == weights.keys() - {"head.weight", "head.bias"}
    for child in model.children():
        child.load_state_dict({n: weights[n] for n in child.state_dict()})
    with torch.no_grad():
        _, expected = whole.forward_intermediates(images, (1, 3))
        maps = model(images)
    if feature_cls == "dict":
        assert list(maps) == ["1", "3"]
        maps = list(maps.values())
    assert isinstance(maps, list)
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == model.feature_info.reduction() == [8, 32]
    modules = dict(whole.named_modules())
    assert all(entry["module"] in modules for entry in whole.feature_info)


def test_transformers_takes_them_for_backbones() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.TimmBackbone(
        transformers.TimmBackboneConfig(backbone=B0, out_indices=[1, 3]), attention="sra"
    )
    out = model.eval()(draw_images())
    assert [tuple(m.shape) for m in out.feature_maps] == [(2, 64, 8, 8), (2, 256, 2, 2)]
    assert model.channels == [64, 256]
    assert sum(parameter.numel() for parameter in model.parameters()) > 3e6


def _make_graph(model: nn.Module) -> nn.Module:
    """The model as a graph, traced with the leaves that timm knows of."""
    train, evaluation = get_graph_node_names(model)
    assert train == evaluation
    graph: nn.Module = create_feature_extractor(model, [evaluation[-1]])
    return graph


@each_case
def test_models_are_traced_by_fx(name: str, kind: str) -> None:
    model, images = build(name, kind, drop_path_rate=0.4), draw_images()
    with torch.no_grad():
        expected = model(images)
    gradients = find_gradients(model, images)
    graph = _make_graph(model)
    (logits,) = graph.eval()(images).values()
    assert torch.equal(logits, expected)
    torch.manual_seed(1)
    model.zero_grad()
    (logits,) = graph.train()(images).values()
    logits.square().sum().backward()
    for parameter_name, parameter in graph.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and torch.equal(gradient, gradients[parameter_name])


def test_blocks_are_nodes_of_the_graph() -> None:
    model, images = build(B0, "ecoformer"), draw_images()
    (tokens,) = create_feature_extractor(model, ["block2.1"])(images).values()
    assert tokens.shape == (2, 64, 64)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@each_case
def test_models_are_traced_but_not_scripted(name: str, kind: str) -> None:
    model, images = build(name, kind), draw_images()
    with torch.no_grad():
        traced = torch.jit.trace(model, images, check_trace=False)  # by other images, below
        other = draw_images(2).flip(0)
        # A traced MLP sums other parts of its hidden channels.
        torch.testing.assert_close(traced(other), model(other), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"cannot be scripted; .* torch\.jit\.trace") as error:
        torch.jit.script(model)
    assert "\n" not in str(error.value)
