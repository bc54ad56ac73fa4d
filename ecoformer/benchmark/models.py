"""Whole models, and steps of their training, with each kind of attention.

The backbone's packages are imported inside functions: the benchmark's modules know them late.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ecoformer.benchmark.compare import Contender, Setup, compare
from ecoformer.benchmark.report import Row
from ecoformer.engine.compiling import compile_model
from ecoformer.engine.precision import autocast
from ecoformer.hashing import KernelHash, hash_layers, with_random_hash_functions
from ecoformer.measure import Call, free_bytes
from ecoformer.ops import reference

_REFERENCE = "ecoformer, reference ops"
_TIMM = "timm"
_KINDS = ("ecoformer", _REFERENCE, "msa", "sra", "performer", _TIMM)
# First-stage scores that the reference holds at once, in floats: it is dense.
_FLOATS_A_SCORE = 8
_PATCH = 4


def create_model(kind: str, variant: str) -> nn.Module:
    """Build a model with random weights and hash functions.

    Args:
        kind: of attention; or the shipped one on the reference's operations, or timm's own
            model of that name.
        variant: of PVTv2.

    Returns:
        The model, on the CPU.
    """
    torch.manual_seed(0)
    if kind == _TIMM:
        import timm

        return timm.create_model(variant)
    import pvt

    attention = "ecoformer" if kind == _REFERENCE else kind
    model = with_random_hash_functions(pvt.create_model(variant, attention))
    if kind == _REFERENCE:
        for layer in hash_layers(model).values():
            layer.forward = partial(_attend_by_reference, layer)  # type: ignore[method-assign]
    return model


def _attend_by_reference(layer: KernelHash, q: Tensor, v: Tensor) -> Tensor:
    return reference.kernelized_hash_attention(
        q,
        v,
        anchors=layer.anchors,
        weight=layer.weight,
        kernel_mean=layer.kernel_mean,
        value_bias=layer.config.value_bias,
    )


def build_model(
    kind: str,
    variant: str,
    *,
    batch_size: int,
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
    is_training: bool,
    is_compiled: bool,
) -> Call:
    """Prepare the classification of a batch, or a step of training on it.

    Args:
        kind: as for ``create_model``.
        variant: of PVTv2.
        batch_size: images.
        resolution: their side, pixels.
        device: where it runs.
        dtype: of autocast; float32 for none.
        is_training: a step: forward, backward, AdamW.
        is_compiled: by ``torch.compile``.

    Returns:
        A call that does it once.
    """
    model = create_model(kind, variant).to(device).train(is_training)
    network = compile_model(model) if is_compiled else model
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch_size, 3, resolution, resolution, generator=generator).to(device)
    if not is_training:

        @torch.inference_mode()
        def classify() -> Tensor:
            with autocast(device, dtype):
                return network(images)

        return classify

    targets = torch.randint(1000, (batch_size,), generator=generator).to(device)
    # On CUDA the step is captured as a graph, which the optimiser must know.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, capturable=device.type == "cuda")

    def step() -> None:
        with autocast(device, dtype):
            loss = cross_entropy(network(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_model(
    setup: Setup,
    variant: str,
    *,
    batch_size: int,
    resolution: int,
    is_training: bool = False,
    is_compiled: bool = False,
) -> list[Row]:
    """A backbone with each kind of attention.

    Args:
        setup: where and how often.
        variant: of PVTv2.
        batch_size: images.
        resolution: their side, pixels.
        is_training: time steps of training, not evaluation.
        is_compiled: by ``torch.compile``.

    Returns:
        A row each; the reference's where it fits into memory, and none of it compiled.
    """
    num_tokens = (resolution // _PATCH) ** 2
    dense_bytes = 4 * _FLOATS_A_SCORE * batch_size * num_tokens**2
    has_reference = not is_compiled and dense_bytes < free_bytes(setup.device)
    task = f"{variant}, {'training step' if is_training else 'evaluation'}"
    return compare(
        setup,
        f"{task}{', compiled' if is_compiled else ''}",
        [
            Contender(
                kind,
                partial(
                    build_model,
                    kind,
                    variant,
                    batch_size=batch_size,
                    resolution=resolution,
                    device=setup.device,
                    dtype=setup.dtype,
                    is_training=is_training,
                    is_compiled=is_compiled,
                ),
            )
            for kind in _KINDS
            if kind != _REFERENCE or has_reference
        ],
        batch_size=batch_size,
        num_tokens=num_tokens,
    )
