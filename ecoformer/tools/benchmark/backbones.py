"""Time whole models, and steps of their training, with each kind of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ecoformer.engine.compiling import compile_model
from ecoformer.engine.precision import autocast
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import find_family
from ecoformer.ops import use_backend
from ecoformer.tools.benchmark.comparison import (
    REFERENCE_FLOATS,
    Comparison,
    Contender,
    Setup,
    compare,
    lack_of_memory,
)
from ecoformer.tools.benchmark.cores import count_tokens
from ecoformer.tools.benchmark.measurements import Measurement
from ecoformer.tools.measure import Call

_REFERENCE = "ecoformer, reference ops"
_TIMM = "timm"
_KINDS = ("ecoformer", _REFERENCE, "msa", "sra", "performer", _TIMM)


@dataclass(frozen=True)
class Workload:
    """What a model does: classify a batch, or train on it for a step.

    Args:
        variant: of PVTv2.
        resolution: image side, pixels.
        is_training: a step of forward, backward and AdamW.
        is_compiled: by ``torch.compile``.
    """

    variant: str
    batch_size: int
    resolution: int
    is_training: bool
    is_compiled: bool

    def __str__(self) -> str:
        task = f"{self.variant}, {'training step' if self.is_training else 'evaluation'}"
        return f"{task}, compiled" if self.is_compiled else task


def create_model(kind: str, variant: str) -> nn.Module:
    """Build a PVTv2 with random weights and hash functions.

    Args:
        kind: of attention; or the shipped one to run on the reference's operations, or timm's
            own model of that name.
    """
    torch.manual_seed(0)
    if kind == _TIMM:
        import timm

        return timm.create_model(variant)
    attention = "ecoformer" if kind == _REFERENCE else kind
    return with_random_hash_functions(find_family(variant).create_model(variant, attention))


def build_model(kind: str, work: Workload, device: torch.device, dtype: torch.dtype) -> Call:
    """Prepare a model's work, under autocast to ``dtype`` if that is not float32.

    Args:
        kind: as for ``create_model``.
    """
    model = create_model(kind, work.variant).to(device).train(work.is_training)
    network = compile_model(model) if work.is_compiled else model
    generator = torch.Generator().manual_seed(1)
    size = (work.batch_size, 3, work.resolution, work.resolution)
    images = torch.randn(size, generator=generator).to(device)
    prepare = prepare_step if work.is_training else _prepare_classification
    call = prepare(model, network, images, dtype)
    if kind == _REFERENCE:
        call = use_backend("reference")(call)
    if work.is_compiled:
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


def prepare_step(
    model: nn.Module,
    network: nn.Module,
    inputs: Tensor,
    dtype: torch.dtype,
    num_classes: int = 1000,
) -> Call:
    """Prepare forward, backward and AdamW; ``network`` is the model, or the model compiled."""
    targets = torch.arange(len(inputs), device=inputs.device) % num_classes
    # On CUDA the step is captured as a graph, which the optimiser must know.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, capturable=inputs.is_cuda)

    def step() -> None:
        with autocast(inputs.device, dtype):
            loss = cross_entropy(network(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_model(setup: Setup, work: Workload) -> Iterator[list[Measurement]]:
    """Compare a PVTv2 with each kind of attention; the reference is not compiled."""
    num_tokens = count_tokens(work.resolution)
    num_pairs = work.batch_size * num_tokens**2
    why_not = lack_of_memory(4 * REFERENCE_FLOATS * num_pairs, setup.device)
    if work.is_compiled:
        # What an earlier comparison compiled would make this one's sizes dynamic.
        torch.compiler.reset()
    comparison = Comparison(
        setup,
        str(work),
        [
            Contender(
                kind,
                partial(build_model, kind, work, setup.device, setup.dtype),
                why_not=why_not if kind == _REFERENCE else "",
            )
            for kind in _KINDS
            # Compiling gives the reference nothing, and takes minutes.
            if kind != _REFERENCE or not work.is_compiled
        ],
        batch_size=work.batch_size,
        num_tokens=num_tokens,
    )
    yield from compare(comparison)
