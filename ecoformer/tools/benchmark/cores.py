"""Time attention without projections, beside its peers.

Shapes: B batch, H heads, N tokens, D head dim, C = H * D, K hash bits, M anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, isqrt
from types import ModuleType
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ecoformer import ops
from ecoformer.attention.performer import RandomFeatureAttention
from ecoformer.attention.spatial_reduction import SpatialReductionAttention
from ecoformer.ops import kernelized_hash_attention, reference, use_backend
from ecoformer.ops.backends import HashFunctions, find_fused_backend
from ecoformer.tools.benchmark.comparison import (
    REFERENCE_FLOATS,
    Comparison,
    Contender,
    Setup,
    compare,
    compare_lengths,
    lack_of_memory,
)
from ecoformer.tools.benchmark.measurements import Measurement
from ecoformer.tools.measure import Call

EVALUATION = "attention core, evaluation"
TRAINING = "attention core, forward and backward"
SWEEP = "attention core"
# As published.
NUM_BITS, NUM_ANCHORS = 16, 25
# B * N of a sweep over N: what an image costs is then measured at one load of the machine.
_SWEEP_TOKENS = 131_072
_SWEPT = ("ecoformer", "performer", "spatial reduction", "sdpa")
# A core of the sweep that takes longer is not run at larger sizes.
_SLOW_SECONDS = 1.0


def count_tokens(side: int, other: int | None = None) -> int:
    """Count the tokens of PVTv2's first stage, one for every 4 pixels of a side, each way."""
    # Its convolution pads: what is left of 4 pixels makes a token too.
    return ceil(side / 4) * ceil((other or side) / 4)


@dataclass(frozen=True)
class CoreInputs:
    """Random rows and hash functions of an attention core in the first stage of PVTv2-B0.

    Args:
        num_tokens: N; a square for spatial reduction.
        dtype: of the rows.
    """

    batch_size: int
    num_tokens: int
    device: torch.device
    dtype: torch.dtype
    num_heads: ClassVar[int] = 1
    head_dim: ClassVar[int] = 32

    @property
    def num_bytes(self) -> int:
        """Size of the queries, the keys, the values or the output."""
        numel = self.batch_size * self.num_tokens * self.num_heads * self.head_dim
        return numel * self.dtype.itemsize

    def draw_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw queries, keys and values, [B, H, N, D] of ``dtype``, strided as layers give them."""
        generator = torch.Generator().manual_seed(0)
        size = (self.batch_size, self.num_tokens, self.num_heads, self.head_dim)
        # Rows of one image have a direction in common, as those of trained models have.
        common = 0.7 * torch.randn(self.batch_size, 1, *size[2:], generator=generator)
        q, k, v = (torch.randn(size, generator=generator) for _ in range(3))
        rows = (q + common, k + common, v)
        q, k, v = (rearrange(x.to(self.device, self.dtype), "b n h d -> b h n d") for x in rows)
        return q, k, v

    def draw_hash_functions(self, q: Tensor) -> HashFunctions:
        """Draw float32 functions for rows [B, H, N, D], with anchors from the first image."""
        generator = torch.Generator().manual_seed(1)
        unit_rows = reference.normalize_rows(q[:1, :, :196].float())
        anchors = unit_rows[0, :, :NUM_ANCHORS].contiguous()
        weight = torch.randn(self.num_heads, NUM_BITS, NUM_ANCHORS, generator=generator)
        kernel_mean = reference.kernel_features(unit_rows, anchors).mean((0, 2))
        return HashFunctions(anchors, weight.to(self.device), kernel_mean)


# The rows that an attention takes, and the attention itself.
Core = tuple[tuple[Tensor, ...], Callable[..., Tensor]]


def _shipped(inputs: CoreInputs) -> Core:
    q, _, v = inputs.draw_rows()
    functions = inputs.draw_hash_functions(q)
    return (q, v), partial(kernelized_hash_attention, **functions._asdict())


def _blocked(inputs: CoreInputs) -> Core:
    """Take the shipped core by PyTorch's own products, which the C++ backend is there to beat."""
    rows, attend = _shipped(inputs)
    return rows, use_backend("blocked")(attend)


def _halves(inputs: CoreInputs, operations: ModuleType) -> Core:
    """Codes, then attention, in float32; from raw rows, as the shipped core."""
    q, _, v = inputs.draw_rows()
    functions = inputs.draw_hash_functions(q)

    def attend(q: Tensor, v: Tensor) -> Tensor:
        unit_rows = operations.normalize_rows(q.float())
        codes = operations.encode(unit_rows, **functions._asdict())
        return operations.hash_attention(codes, v.float()).to(v.dtype)

    return (q, v), attend


def _softmax(inputs: CoreInputs, backend: str | None = None) -> Core:
    rows = inputs.draw_rows()
    if backend is None:
        return rows, scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v)

    return rows, attend


def _performer(inputs: CoreInputs) -> Core:
    generator = torch.Generator().manual_seed(1)
    return inputs.draw_rows(), RandomFeatureAttention(inputs.head_dim, generator).to(inputs.device)


def _spatial_reduction(inputs: CoreInputs) -> Core:
    """Take the layer without its projections of queries and outputs, which all kinds have."""
    layer = SpatialReductionAttention(
        inputs.num_heads * inputs.head_dim, inputs.num_heads, sr_ratio=8
    ).to(inputs.device, inputs.dtype)
    for name in ("q", "proj"):
        setattr(layer, name, nn.Identity())
    side = isqrt(inputs.num_tokens)
    rows = rearrange(inputs.draw_rows()[0], "b h n d -> b n (h d)")
    return (rows,), lambda x: layer(x, (side, side))


_CORES: dict[str, Callable[[CoreInputs], Core]] = {
    "ecoformer": _shipped,
    "ecoformer, blocked": _blocked,
    "ecoformer, eager halves": partial(_halves, operations=ops),
    "reference": partial(_halves, operations=reference),
    "sdpa": _softmax,
    "sdpa, flash": partial(_softmax, backend="FLASH_ATTENTION"),
    "sdpa, efficient": partial(_softmax, backend="EFFICIENT_ATTENTION"),
    "sdpa, cudnn": partial(_softmax, backend="CUDNN_ATTENTION"),
    "sdpa, math": partial(_softmax, backend="MATH"),
    "performer": _performer,
    "spatial reduction": _spatial_reduction,
}
_CUDA_ONLY = ("sdpa, efficient", "sdpa, cudnn")
# Scores or differences in memory: these grow with N^2, and need so many floats a score.
_FLOATS_A_SCORE = {"reference": REFERENCE_FLOATS, "sdpa, math": 6}


def build_core(kind: str, inputs: CoreInputs, *, has_backward: bool) -> Call:
    """Prepare one attention without projections, with the gradients of all rows if asked for."""
    rows, attend = _CORES[kind](inputs)
    if not has_backward:
        return torch.inference_mode()(lambda: attend(*rows))
    rows = tuple(row.detach().requires_grad_() for row in rows)
    with torch.no_grad():
        out = attend(*rows)
        generator = torch.Generator().manual_seed(2)
        grad = torch.randn(out.shape, generator=generator).to(out)
    return lambda: torch.autograd.grad(attend(*rows), rows, grad)


def core_contenders(
    inputs: CoreInputs, *, has_backward: bool, kinds: Sequence[str] = tuple(_CORES)
) -> Iterator[Contender]:
    """Line up cores in the order of ``kinds``."""
    scores = inputs.batch_size * inputs.num_heads * inputs.num_tokens**2
    # Elsewhere nobody knows what is moved: what fits into caches is not.
    row = torch.empty(1, inputs.num_heads, 1, inputs.head_dim).to(inputs.device, inputs.dtype)
    weight = torch.empty(inputs.num_heads, NUM_BITS, NUM_ANCHORS)
    functions = HashFunctions(row[0], weight, weight[:, 0])
    has_kernels = find_fused_backend("", row, row, functions).name == "triton"
    for kind in kinds:
        is_kernel = kind == "ecoformer" and has_kernels
        why_not = lack_of_memory(4 * scores * _FLOATS_A_SCORE.get(kind, 0), inputs.device)
        if kind in _CUDA_ONLY and inputs.device.type != "cuda":
            why_not = "runs on CUDA only"
        yield Contender(
            kind,
            partial(build_core, kind, inputs, has_backward=has_backward),
            _pass_bytes(inputs, has_backward=has_backward) if is_kernel else None,
            why_not,
        )


def _pass_bytes(inputs: CoreInputs, *, has_backward: bool) -> int:
    """Count what the Triton kernels read and write."""
    # q for the bandwidth; q and v for the sums; v for the output. Then twice q, v and the
    # output's gradient, for sums of gradients and for the two gradients.
    num_rows = 5 + (8 if has_backward else 0)
    # A code of 16 bits takes 32; it is written once and read once.
    code_bytes = 2 * 4 * inputs.batch_size * inputs.num_heads * inputs.num_tokens
    return num_rows * inputs.num_bytes + code_bytes


def measure_attention(
    setup: Setup, *, batch_size: int, num_tokens: int
) -> Iterator[list[Measurement]]:
    """Compare all cores, forward, then with backward."""
    inputs = CoreInputs(batch_size, num_tokens, setup.device, setup.dtype)
    for task, has_backward in ((EVALUATION, False), (TRAINING, True)):
        comparison = Comparison(
            setup,
            task,
            list(core_contenders(inputs, has_backward=has_backward)),
            batch_size=batch_size,
            num_tokens=num_tokens,
            # q, v and the output; then its gradient and those of q and v beside q and v.
            least_bytes=(3 + 5 * has_backward) * inputs.num_bytes,
        )
        yield from compare(comparison)


def measure_attention_sweep(
    setup: Setup, *, token_counts: Sequence[int], kinds: Sequence[str] = _SWEPT
) -> Iterator[list[Measurement]]:
    """Compare cores over a range of N, with as many images as make B * N about 131,072.

    Args:
        token_counts: N, rising.
    """

    def line_up(num_tokens: int, too_slow: Mapping[str, str]) -> Comparison:
        batch_size = max(1, _SWEEP_TOKENS // num_tokens)
        inputs = CoreInputs(batch_size, num_tokens, setup.device, setup.dtype)
        contenders = core_contenders(inputs, has_backward=False, kinds=kinds)
        return Comparison(
            setup,
            SWEEP,
            [replace(c, why_not=too_slow.get(c.name, c.why_not)) for c in contenders],
            batch_size=batch_size,
            num_tokens=num_tokens,
            least_bytes=3 * inputs.num_bytes,
        )

    yield from compare_lengths(line_up, token_counts, slow_seconds=_SLOW_SECONDS)
