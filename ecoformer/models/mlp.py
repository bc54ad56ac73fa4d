"""The MLP of a block, with the convolution that some backbones have in it."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.functional import conv2d, linear

from ecoformer.attention.base import Size
from ecoformer.ops.depthwise import Form, depthwise_conv, has_kernel

# An MLP's hidden map of more values than this is made in blocks on a CPU; in float32, 8 MB.
_MAX_WHOLE_MAP = 2**21
# Values of a block for each thread: a megabyte stays in the cache of a core.
_BLOCK_VALUES_PER_THREAD = 2**18
# Hidden channels of a part in a graph, for each of the MLP's own. A compiler gives a part the
# memory of the last one, and would not split the whole.
_NUM_PART_CHANNELS = 2
# Channels of a block are a multiple of this, which vectors take.
_CHANNEL_STEP = 32


# Not by einops: a large map has some hundred blocks, and its Python would cost a percent.
def _as_map(x: Tensor, size: Size) -> Tensor:
    """View tokens as an image in channels-last memory, so that a convolution copies nothing."""
    return x.unflatten(1, size).movedim(3, 1)


def _as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class DepthwiseConv(nn.Module):
    """3 x 3 depthwise convolution of tokens [B, N, C] as a map (PVTv2, arXiv 2106.13797)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return _as_tokens(self.dwconv(_as_map(x, size)))


# What an MLP is made of, and what takes each value by itself.
_PLAIN_LAYERS = {nn.Linear, nn.Conv2d, DepthwiseConv, nn.GELU, nn.ReLU, nn.Identity, nn.Dropout}


class Mlp(nn.Module):
    """Two linear layers with GELU between them, [B, N, C] to [B, N, C]; dropout after each.

    ``has_dwconv`` convolves before the GELU; ``has_relu`` puts a ReLU before that (linear PVTv2).

    Source: PVTv2, arXiv 2106.13797, for the convolution.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        *,
        has_dwconv: bool = False,
        has_relu: bool = False,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.relu = nn.ReLU() if has_relu else nn.Identity()
        self.dwconv = DepthwiseConv(hidden_dim) if has_dwconv else None
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            if self._pays_in_parts(x):
                return self._sum_parts(x, size, _NUM_PART_CHANNELS * self.fc2.out_features)
        elif self._pays_in_blocks(x):
            return self._forward_in_blocks(x, size)
        x = self.fc1(x)
        if self._is_fused(x):
            x = self._fuse(x, size)
        else:
            x = self.relu(x)
            if self.dwconv is not None:
                x = self.dwconv(x, size)
            x = self.act(x)
        return self.drop(self.fc2(self.drop(x)))

    def _is_fused(self, x: Tensor) -> bool:
        """Whether one kernel does it all, and nothing needs the layers to be called as modules."""
        if self.dwconv is None or not has_kernel(x):
            return False
        is_built = type(self.relu) in (nn.ReLU, nn.Identity) and isinstance(self.act, nn.GELU)
        layers = (self.relu, self.dwconv, self.dwconv.dwconv, self.act)
        return is_built and self.act.approximate == "none" and all(map(is_plain, layers))

    def _fuse(self, x: Tensor, size: Size) -> Tensor:
        assert self.dwconv is not None
        form: Form = "relu gelu" if isinstance(self.relu, nn.ReLU) else "gelu"
        weight, bias = self.dwconv.dwconv.parameters()
        return depthwise_conv(x.unflatten(1, size), weight, bias, form).flatten(1, 2)

    def _pays_in_blocks(self, x: Tensor) -> bool:
        """Whether blocks are faster, and nothing needs the layers to be called as modules."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return False
        is_large = x.shape[:-1].numel() * self.fc1.out_features > _MAX_WHOLE_MAP
        return is_large and self._is_plain()

    def _pays_in_parts(self, x: Tensor) -> bool:
        """The same in a graph, by nothing that depends on the size of the map."""
        is_graph = torch.compiler.is_exporting() or torch.jit.is_tracing()
        if x.device.type != "cpu" or (torch.is_grad_enabled() and not is_graph):
            return False
        return self._is_plain()

    def _is_plain(self) -> bool:
        drops = self.training and self.drop.p
        return not drops and all(
            is_plain(layer) for child in self.children() for layer in child.modules()
        )

    def _forward_in_blocks(self, x: Tensor, size: Size) -> Tensor:
        """The same, some images and some hidden channels at a time.

        A block stays in the cache and takes the memory that the last one gave back: clearing
        fresh pages for the whole hidden map would take longer than the arithmetic.
        """
        num_tokens, num_hidden = x.shape[1], self.fc1.out_features
        num_values = _BLOCK_VALUES_PER_THREAD * torch.get_num_threads()
        num_images = max(1, num_values // (num_tokens * num_hidden))
        num_channels = max(1, num_values // (num_tokens * _CHANNEL_STEP)) * _CHANNEL_STEP
        blocks = [self._sum_parts(images, size, num_channels) for images in x.split(num_images)]
        return torch.cat(blocks)

    def _sum_parts(self, x: Tensor, size: Size, num_channels: int) -> Tensor:
        """[B, N, C]: hidden channels meet in fc2 alone, as terms of its sum."""
        num_hidden = self.fc1.out_features
        parts = [slice(i, i + num_channels) for i in range(0, num_hidden, num_channels)]
        out = reduce(torch.add, (self._mix_part(x, size, part) for part in parts))
        return out.add_(self.fc2.bias.to(out.dtype))

    def _mix_part(self, x: Tensor, size: Size, part: slice) -> Tensor:
        """[B, N, C]: what some hidden channels add to the output."""
        x = self.relu(linear(x, self.fc1.weight[part], self.fc1.bias[part]))
        if self.dwconv is not None:
            weight, bias = (tensor[part] for tensor in self.dwconv.dwconv.parameters())
            x = conv2d(_as_map(x, size), weight, bias, padding=1, groups=weight.shape[0])
            x = _as_tokens(x)
        return linear(self.act(x), self.fc2.weight[:, part])


# Exporters put fake ones in the place of parameters.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)


def is_plain(layer: nn.Module) -> bool:
    """Tell whether a layer is what it was built as: nothing replaces, wraps or watches it."""
    return (
        type(layer) in _PLAIN_LAYERS
        and getattr(layer, "bias", True) is not None
        # Not quantized or sharded ones, which slices take apart.
        and all(type(p) in _PLAIN_TENSORS for p in layer.parameters(recurse=False))
        and not is_watched(layer)
    )


def is_watched(layer: nn.Module) -> bool:
    """Tell whether something hangs on the calls of a layer, and would miss them."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return bool(hooks or layer._backward_hooks or "forward" in vars(layer))
