"""Images as bytes until they are on the device, where they become what a network takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate


class Area(NamedTuple):
    """A rectangle of an image, pixels."""

    top: int
    left: int
    height: int
    width: int


class Picture(NamedTuple):
    """An image as it leaves its transform.

    Args:
        pixels: [height, width, 3], uint8.
        erased: areas, and what they hold once the image is normalised: [3, height, width], float32.
    """

    pixels: Tensor
    erased: Sequence[tuple[Area, Tensor]] = ()


@dataclass(frozen=True)
class PictureBatch:
    """A quarter of the bytes of the batch that it becomes on the device.

    Args:
        pixels: [B, height, width, 3], uint8.
        areas: those that are erased, and in which image, in the order of erasing.
        values: what they hold, one after the other, float32.
    """

    pixels: Tensor
    areas: Sequence[tuple[int, Area]]
    values: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def pin_memory(self) -> PictureBatch:
        """Page-lock the tensors, as ``DataLoader`` asks for."""
        return PictureBatch(self.pixels.pin_memory(), self.areas, self.values.pin_memory())

    def unpack(self, device: torch.device) -> Tensor:
        """Make images [B, 3, height, width], float32, on a device; does not wait for them."""
        images = normalize(self.pixels.to(device, non_blocking=True))
        values = self.values.to(device, non_blocking=True)
        blocks = values.split([3 * area.height * area.width for _, area in self.areas])
        for (image, (top, left, height, width)), block in zip(self.areas, blocks, strict=True):
            place = images[image, :, top : top + height, left : left + width]
            place.copy_(block.view(3, height, width))
        return images


@dataclass(frozen=True)
class PaddedBatch:
    """Images of several sizes, each in the upper left corner of as many pixels.

    Args:
        pixels: [B, height, width, 3], uint8.
        sizes: height and width of each image.
    """

    pixels: Tensor
    sizes: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.pixels)

    def pin_memory(self) -> PaddedBatch:
        """Page-lock the tensor, as ``DataLoader`` asks for."""
        return PaddedBatch(self.pixels.pin_memory(), self.sizes)

    def unpack(self, device: torch.device) -> Tensor:
        """Make images [B, 3, height, width], float32, 0 around each; does not wait for them."""
        images = normalize(self.pixels.to(device, non_blocking=True))
        for image, (height, width) in zip(images, self.sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images


def collate_pictures(samples: list[tuple[Picture, Any]]) -> tuple[PictureBatch, Any]:
    """Make a batch of pictures of one size and their labels, which are collated as usual."""
    pixels, labels = default_collate([(picture.pixels, label) for picture, label in samples])
    erased = [
        (image, area, values)
        for image, (picture, _) in enumerate(samples)
        for area, values in picture.erased
    ]
    # One tensor: each has a price of its own on its way from a worker.
    values = torch.cat([torch.empty(0), *(values.flatten() for _, _, values in erased)])
    return PictureBatch(pixels, [(image, area) for image, area, _ in erased], values), labels


def normalize(pixels: Tensor) -> Tensor:
    """Turn pixels [B, height, width, 3], uint8, into what networks take.

    Returns:
        [B, 3, height, width], float32, with ImageNet's mean and deviation taken out; of the same
        bits as by torchvision's ``ToTensor`` and ``Normalize``.
    """
    white, mean, std = _constants(pixels.device)
    images = pixels.movedim(-1, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(white).sub_(mean).div_(std)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """White [], mean and deviation [3, 1, 1]; tensors, since CUDA multiplies by 1 / 255 instead."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    # An evaluation may be the first to ask, and what it makes is of no use in training.
    with torch.inference_mode(False):
        mean, std = (
            torch.tensor(moments, device=device).view(3, 1, 1)
            for moments in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        return torch.tensor(255.0, device=device), mean, std
