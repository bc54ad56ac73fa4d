"""Whole models, and steps of their training, with each kind of attention.

The backbone's packages are imported inside functions: the benchmark's modules know them late.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ecoformer.engine.compiling import compile_model
from ecoformer.engine.precision import autocast
from ecoformer.hashing import with_random_hash_functions
from ecoformer.ops import use_backend
from ecoformer.tools.benchmark.compare import (
    REFERENCE_FLOATS,
    Comparison,
    Contender,
    Setup,
    compare,
    lack_of_memory,
)
from ecoformer.tools.benchmark.cores import count_tokens
from ecoformer.tools.benchmark.report import Row
from ecoformer.tools.measure import Call

_REFERENCE = "ecoformer, reference ops"
_TIMM = "timm"
_KINDS = ("ecoformer", _REFERENCE, "msa", "sra", "performer", _TIMM)


def create_model(kind: str, variant: str) -> nn.Module:
    """Build a model with random weights and hash functions.

    Args:
        kind: of attention; or the shipped one to run on the reference's operations, or timm's
            own model of that name.
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
    return with_random_hash_functions(pvt.create_model(variant, attention))


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
    prepare = _prepare_step if is_training else _prepare_classification
    call = prepare(model, network, images, dtype)
    if kind == _REFERENCE:
        call = use_backend("reference")(call)
    if is_compiled:
        # It compiles now, not when it is timed.
        call()
    return call


def _prepare_classification(
    model: nn.Module, network: nn.Module, images: Tensor, dtype: torch.dtype
) -> Call:
    @torch.inference_mode()
    def classify() -> Tensor:
        with autocast(images.device, dtype):
            return network(images)

    return classify


def _prepare_step(model: nn.Module, network: nn.Module, images: Tensor, dtype: torch.dtype) -> Call:
    targets = torch.arange(len(images), device=images.device) % 1000
    # On CUDA the step is captured as a graph, which the optimiser must know.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, capturable=images.is_cuda)

    def step() -> None:
        with autocast(images.device, dtype):
            loss = cross_entropy(network(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def name_task(variant: str, *, is_training: bool, is_compiled: bool) -> str:
    """Title the comparison of models.

    Args:
        variant: of PVTv2.
        is_training: steps of training, not evaluation.
        is_compiled: by ``torch.compile``.

    Returns:
        ``Row.task``.
    """
    task = f"{variant}, {'training step' if is_training else 'evaluation'}"
    return f"{task}, compiled" if is_compiled else task


def measure_model(
    setup: Setup,
    variant: str,
    *,
    batch_size: int,
    resolution: int,
    is_training: bool = False,
    is_compiled: bool = False,
) -> Iterator[list[Row]]:
    """A backbone with each kind of attention.

    Args:
        setup: where and how often.
        variant: of PVTv2.
        batch_size: images.
        resolution: their side, pixels.
        is_training: time steps of training, not evaluation.
        is_compiled: by ``torch.compile``.

    Yields:
        A row each; the reference is not compiled.
    """
    num_tokens = count_tokens(resolution)
    why_not = lack_of_memory(4 * REFERENCE_FLOATS * batch_size * num_tokens**2, setup.device)
    if is_compiled:
        # What an earlier comparison compiled would make this one's sizes dynamic.
        torch.compiler.reset()
    build = partial(
        build_model,
        variant=variant,
        batch_size=batch_size,
        resolution=resolution,
        device=setup.device,
        dtype=setup.dtype,
        is_training=is_training,
        is_compiled=is_compiled,
    )
    comparison = Comparison(
        setup,
        name_task(variant, is_training=is_training, is_compiled=is_compiled),
        [
            Contender(kind, partial(build, kind), why_not=why_not if kind == _REFERENCE else "")
            for kind in _KINDS
            # Compiling gives the reference nothing, and takes minutes.
            if kind != _REFERENCE or not is_compiled
        ],
        batch_size=batch_size,
        num_tokens=num_tokens,
    )
    yield from compare(comparison)
