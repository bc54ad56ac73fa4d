"""Time the depthwise convolution of a block's hidden map beside PyTorch's operations.

Shapes: B batch, H height, W width, C hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import isqrt

import torch
from torch import Tensor

from ecoformer.ops import depthwise_conv, use_backend
from ecoformer.ops.depthwise import compose, has_kernel
from ecoformer.tools.benchmark.comparison import Comparison, Contender, Setup, compare
from ecoformer.tools.benchmark.measurements import Measurement
from ecoformer.tools.measure import Call

EVALUATION = "depthwise convolution and GELU, evaluation"
TRAINING = "depthwise convolution and GELU, forward and backward"
# Of the first stage of PVTv2-B0.
NUM_CHANNELS = 256
_CHANNELS_FIRST = "pytorch, channels first"
_CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "ecoformer": depthwise_conv,
    "pytorch": compose,
    _CHANNELS_FIRST: compose,
    "reference": use_backend("reference")(depthwise_conv),
}


def build_convolution(
    name: str,
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    has_backward: bool,
) -> Call:
    """Prepare GELU(conv(x)) of maps [B, H, W, C], with all gradients if asked for.

    Args:
        name: ``"ecoformer"``, ``"reference"`` or ``"pytorch"``, which takes maps as blocks make
            them, channels last; or ``"pytorch, channels first"``.
    """
    generator = torch.Generator().manual_seed(0)
    convolve = _CONVOLUTIONS[name]
    x = torch.randn(shape, generator=generator).to(device, dtype)
    if name == _CHANNELS_FIRST:
        x = x.movedim(3, 1).contiguous().movedim(1, 3)
    grad = torch.randn(shape, generator=generator).to(x)
    weight = torch.randn(shape[3], 1, 3, 3, generator=generator).to(device)
    bias = torch.randn(shape[3], generator=generator).to(device)
    if not has_backward:
        return torch.inference_mode()(lambda: convolve(x, weight, bias, "gelu"))
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    return lambda: torch.autograd.grad(convolve(*inputs, "gelu"), inputs, grad)


def measure_convolutions(
    setup: Setup, *, batch_size: int, num_tokens: int
) -> Iterator[list[Measurement]]:
    """Compare all ways, forward, then with backward; ``num_tokens`` is a square."""
    side = isqrt(num_tokens)
    shape = (batch_size, side, side, NUM_CHANNELS)
    x = torch.empty(1, 1, 1, 1, device=setup.device, dtype=setup.dtype)
    map_bytes = batch_size * num_tokens * NUM_CHANNELS * setup.dtype.itemsize
    for task, has_backward in ((EVALUATION, False), (TRAINING, True)):
        build = partial(
            build_convolution,
            shape=shape,
            device=setup.device,
            dtype=setup.dtype,
            has_backward=has_backward,
        )
        # The kernels' backward writes and reads the gradient before GELU.
        pass_bytes = (2 + 5 * has_backward) * map_bytes
        comparison = Comparison(
            setup,
            task,
            [
                Contender(
                    name,
                    partial(build, name),
                    pass_bytes if name == "ecoformer" and has_kernel(x) else None,
                )
                for name in _CONVOLUTIONS
            ],
            batch_size=batch_size,
            num_tokens=num_tokens,
            # The map and the output; then map, output's gradient and the map's.
            least_bytes=(2 + 3 * has_backward) * map_bytes,
        )
        yield from compare(comparison)
