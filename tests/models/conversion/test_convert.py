"""What ``convert`` promises of every model, on a small ViT of timm's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DataParallel, DistributedDataParallel

import ecoformer
from ecoformer import HashConfig, InputError
from ecoformer.engine.launch import process_group
from ecoformer.hashing import hash_layers
from ecoformer.models.conversion import ConvertedAttention
from tests.engine.ranks import run_ranks

HASHING = HashConfig(num_bits=4, num_anchors=5, num_similar=3, num_fit_steps=2)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3}
TINY |= {"num_heads": 3, "num_classes": 5}


def build() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


def build_fitted() -> Any:
    model = build()
    ecoformer.convert(model, HASHING)
    ecoformer.fit_hash_functions(model, IMAGES, torch.Generator().manual_seed(0))
    return model


def snapshot(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return dict(model.named_modules(remove_duplicate=False)), state


def assert_untouched(model: nn.Module, before: tuple[Any, dict[str, Tensor]]) -> None:
    modules, state = snapshot(model)
    assert modules == before[0]
    assert state.keys() == before[1].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before[1].items())


# ------------------------------------------------------------------------------- what is carried


def test_weights_stay_bit_for_bit_and_no_random_number_is_drawn() -> None:
    model, original = build(), build()
    generator = torch.get_rng_state()
    report = ecoformer.convert(model, HASHING)
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(report.converted) == NAMES
    assert not report.kept
    for name in NAMES:
        layer, before = model.get_submodule(name), original.get_submodule(name)
        queries, _, values = before.qkv.weight.chunk(3)
        assert torch.equal(layer.to_qk.weight, queries)
        assert torch.equal(layer.to_v.weight, values)
        assert torch.equal(layer.to_qk.bias, before.qkv.bias.chunk(3)[0])
        assert torch.equal(layer.to_v.bias, before.qkv.bias.chunk(3)[2])
        assert torch.equal(layer.proj.weight, before.proj.weight)
        assert layer.hash.config == HASHING
        # Whole weights, and not views that are saved with all three thirds.
        assert layer.to_qk.weight.untyped_storage().nbytes() == 4 * 24 * 24
    rest = [name for name in original.state_dict() if ".attn.qkv" not in name]
    after = model.state_dict()
    assert all(torch.equal(after[name], original.state_dict()[name]) for name in rest)


@pytest.mark.parametrize("is_training", [True, False])
def test_mode_dtype_and_frozen_weights_stay(is_training: bool) -> None:
    model = build().train(is_training).to(torch.bfloat16)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].attn.qkv.bias.requires_grad_(False)
    ecoformer.convert(model, HASHING)
    assert all(module.training == is_training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    # A rounded hash function would be another one.
    assert model.blocks[0].attn.hash.anchors.dtype == torch.float32
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    inside = {name for name, _ in model.blocks[0].named_parameters()}
    assert frozen == {f"blocks.0.{name}" for name in inside} | {
        "blocks.1.attn.to_qk.bias",
        "blocks.1.attn.to_v.bias",
    }
    ecoformer.fit_hash_functions(model, IMAGES.bfloat16())
    assert model(IMAGES.bfloat16()).dtype == torch.bfloat16


def test_a_model_without_data_converts() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    ecoformer.convert(model)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu").load_state_dict(convert_real().state_dict())


def convert_real() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224")
    ecoformer.convert(model)
    return model


# -------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("select", "converted"),
    [
        ("blocks.1", NAMES[1:2]),
        (["blocks.2.attn", "blocks.0"], [NAMES[0], NAMES[2]]),
        (lambda name, layer: name != "blocks.0.attn" and layer.num_heads == 3, NAMES[1:]),
    ],
)
def test_select_takes_names_and_predicates(select: Any, converted: list[str]) -> None:
    model = build()
    report = ecoformer.convert(model, HASHING, select)
    assert list(report.converted) == converted
    assert set(report.kept.values()) == {"not selected"}
    assert [isinstance(block.attn, ConvertedAttention) for block in model.blocks] == [
        name in converted for name in NAMES
    ]
    # The rest later.
    rest = ecoformer.convert(model, HASHING)
    assert sorted([*rest.converted, *converted]) == NAMES


def test_the_report_is_a_table_and_tells_whether_it_pays() -> None:
    report = ecoformer.convert(build(), select=["blocks.0"])
    first, *_ = [line for line in str(report).splitlines() if "EcoFormer |" in line]
    assert first.split("|")[1:3] == [" blocks.0.attn ", " EcoFormer "]
    assert "3 heads of 8 channels, from Attention" in first
    assert "| blocks.2.attn | as it was | not selected" in str(report)
    # Of 16 patches and a class token.
    assert "this model has 17, so that the conversion will not pay" in report.advice
    large = timm.create_model("vit_tiny_patch16_224")
    assert ecoformer.convert(large).advice.endswith("this model has 197.")
    assert "will not pay" not in report.advice.replace("so that the conversion will not pay", "")


# --------------------------------------------------------------------------------------- refusing


class Own(Attention):
    """May compute anything."""


class Twice(nn.Module):
    """Two blocks that share a module, or one of its weights."""

    def __init__(self, *, is_module: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(Attention(24, 3)) for _ in range(2))
        if is_module:
            self.second[0] = self.first[0]
        else:
            second = self.second[0]
            assert isinstance(second, Attention)
            second.qkv.weight = self.first[0].get_parameter("qkv.weight")


def convert_twice() -> nn.Module:
    model = build()
    ecoformer.convert(model, HASHING)
    return model


@pytest.mark.parametrize(
    ("build_model", "keywords", "message"),
    [
        (lambda: Twice(is_module=True), {}, r"first\.0 and second\.0 are one and the same module"),
        (lambda: Twice(is_module=True), {"select": "first"}, "are one and the same module"),
        (lambda: Twice(is_module=False), {}, r"first\.0\.qkv\.weight is used by another module"),
        (convert_twice, {}, "converted already"),
        (convert_twice, {"select": "blocks.0.attn"}, "holds no softmax attention"),
        (lambda: nn.Linear(3, 3), {}, "Linear has no softmax self-attention"),
        (lambda: Attention(24, 3), {}, "cannot be replaced inside of itself; give the model"),
        (lambda: DataParallel(build()), {}, "wrapped in DataParallel"),
        (lambda: torch.compile(build()), {}, "wrapped in OptimizedModule"),
        (build, {"hashing": 8}, "hashing is an ecoformer.HashConfig"),
        (build, {"select": "blocks.3"}, "the model has no 'blocks.3', did you mean"),
        (build, {"select": [3]}, "the model has no 3"),
        (build, {"select": 3}, "is a predicate, not a int"),
        (lambda: nn.Sequential(Own(24, 3)), {}, r"no adapter knows .*\.Own: register a Form"),
        (build, {"select": "patch_embed"}, "patch_embed holds no softmax attention"),
        (build, {"select": []}, "no layer was selected"),
        (build, {"select": lambda name, layer: False}, "no layer was selected"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_untouched(
    build_model: Any, keywords: dict[str, Any], message: str
) -> None:
    model = build_model()
    before = snapshot(model)
    with pytest.raises(InputError, match=message) as caught:
        ecoformer.convert(model, **keywords)
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)


def test_no_module_is_one_line() -> None:
    with pytest.raises(InputError, match=r"takes a torch\.nn\.Module, not a str"):
        ecoformer.convert("vit_tiny_patch16_224")  # type: ignore[arg-type]


def test_a_failure_halfway_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    before, made = snapshot(model), []

    def fail(self: Any, form: Any, layer: Any, hashing: Any) -> None:
        made.append(layer)
        if len(made) == 2:
            raise MemoryError

    monkeypatch.setattr(ConvertedAttention, "__init__", fail)
    with pytest.raises(MemoryError):
        ecoformer.convert(model)
    assert_untouched(model, before)


class Quantized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.round())


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
    ],
    ids=["forward hook", "backward hook"],
)
def test_layers_whose_insides_were_changed_are_kept(register: Any) -> None:
    model = build()
    hook = register(model.blocks[0].attn)
    model.blocks[1].attn.qkv = Quantized(24, 72)
    model.blocks[2].attn.forward = model.blocks[2].attn.forward
    with pytest.raises(InputError, match="none of the 3"):
        ecoformer.convert(model)
    hook.remove()
    kept = ecoformer.convert(model).kept
    assert "is no plain linear layer" in kept["blocks.1.attn"]
    assert "no adapter knows" in kept["blocks.2.attn"]
    model = build()
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)
    assert list(ecoformer.convert(model).kept) == ["blocks.0.attn"]


# ------------------------------------------------------------------------------------- life after


def test_state_dicts_go_into_a_model_converted_alike() -> None:
    model, fresh = build_fitted(), build()
    ecoformer.convert(fresh, HASHING)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    another = build()
    ecoformer.convert(another, HASHING)
    report = ecoformer.load_checkpoint(another, model.state_dict(), strict=True)
    assert not report.missing
    assert torch.equal(another(IMAGES), model(IMAGES))


def test_softmax_weights_go_into_a_converted_model() -> None:
    original, model = build(), build_fitted()
    expected = model.state_dict()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    report = ecoformer.load_checkpoint(model, original.state_dict())
    assert not (report.missing or report.unused)
    assert {name.rpartition(".attn.")[2] for name in report.dropped} == {
        "qkv.weight[k]",
        "qkv.bias[k]",
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_copies_and_pickles_compute_the_same() -> None:
    model = build_fitted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IMAGES), model(IMAGES))


def test_the_released_layout_is_refused() -> None:
    with pytest.raises(InputError, match=r"save model\.state_dict\(\)"):
        ecoformer.export_released(build_fitted())


@pytest.mark.parametrize(
    "inputs", [IMAGES, (IMAGES,), {"x": IMAGES}], ids=["a tensor", "a tuple", "a dict"]
)
def test_the_fit_takes_what_the_model_takes(inputs: Any) -> None:
    model = build()
    ecoformer.convert(model, HASHING)
    with pytest.raises(InputError, match="fit_hash_functions"):
        model(IMAGES)
    fits = ecoformer.fit_hash_functions(model, inputs, torch.Generator().manual_seed(0))
    assert list(fits) == [f"{name}.hash" for name in NAMES]
    assert torch.equal(model(IMAGES), build_fitted()(IMAGES))


def test_it_compiles_as_one_graph_and_exports() -> None:
    model = build_fitted()
    expected = model(IMAGES)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(IMAGES), expected)
    assert counter.frame_count == 1
    exported = torch.export.export(model, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), expected)


def test_masks_compile_and_others_fail_there_too() -> None:
    model = nn.Sequential(Attention(24, 3))
    ecoformer.convert(model, HASHING)
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))
    ecoformer.fit_hash_functions(model, x)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])[:, None, None]
    torch.compiler.reset()
    compiled = torch.compile(model[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, attn_mask=mask), model[0](x, attn_mask=mask))
    with pytest.raises(RuntimeError, match="hides padding from all tokens"):
        compiled(x, attn_mask=torch.ones(2, 1, 6, 6).tril().bool())


def test_costs_before_and_after_are_counted() -> None:
    model = build()
    before = ecoformer.count_cost(model, 32).by_kind()
    ecoformer.convert(model, HASHING)
    after = ecoformer.count_cost(model, 32).by_kind()
    # Three blocks of 17 tokens: 2 N^2 C products, H N^2 more for the scale; by hand.
    assert before["msa attention"] == (3 * (2 * 289 * 24 + 3 * 289), 3 * 2 * 289 * 24)
    assert "msa attention" not in after
    assert after["ecoformer attention"][0] == 3 * 3 * 17 * (2 * 5 + 5 * 4 + 4 + 1 + 8)
    # The keys' projections are gone.
    assert before["linear"][0] - after["linear"][0] == 3 * 17 * 24 * 24


def learn_on_rank() -> list[Tensor]:
    with process_group():
        model = build_fitted().train()
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        rank = torch.distributed.get_rank()
        for images in IMAGES[rank * 2 : rank * 2 + 2].split(1):
            optimizer.zero_grad()
            wrapped(images).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]


def test_two_ranks_train_as_one_process() -> None:
    first, second = run_ranks(learn_on_rank, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model = build_fitted().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images in (IMAGES[::2], IMAGES[1::2]):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)
    start = build()
    assert not torch.equal(model.blocks[0].attn.to_qk.weight, start.blocks[0].attn.qkv.weight[:24])
    assert all(layer.is_fitted for layer in hash_layers(model).values())
