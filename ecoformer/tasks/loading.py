"""Tasks whose data are the splits of a data set, opened by ``ecoformer.data``."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from ecoformer.data import Loaders
from ecoformer.data.sequences import TEST_SETS
from ecoformer.errors import InputError
from ecoformer.tasks.base import Data, Task

if TYPE_CHECKING:
    from ecoformer.config import Config

_logger = logging.getLogger(__name__)

# Settings that say how large a sample is.
_SIZES = ("input_size", "short_side", "long_side", "max_tokens")


class LoadedTask(Task):
    """Opens loaders once, and names the samples of a step by what they drew.

    Raises:
        InputError: a setting has a value that has no meaning here.
    """

    # Of a model that is built without data.
    default_classes: int
    # Those settings of size that have a meaning.
    sizes: Sequence[str] = _SIZES
    # Other settings of none, and the value that each has then.
    without_meaning: Mapping[str, object] = MappingProxyType({})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._loaders: Loaders | None = None
        settings, defaults = config.to_flat(), type(config)().to_flat()
        for name in _SIZES:
            if name not in self.sizes and settings[name] != defaults[name]:
                raise InputError(
                    f"{name} {settings[name]} is no size of --task {config.run.task}, which has "
                    f"{' and '.join(self.sizes)}; leave it out."
                )
        for name, off in self.without_meaning.items():
            if settings[name] != off:
                raise InputError(f"{name} {settings[name]} is for {self.explain(off)}")

    def explain(self, off: object) -> str:
        """Say what a setting is for that must be ``off``, and what to do, to the end of a line."""
        raise NotImplementedError

    @abstractmethod
    def open_loaders(self, *, is_train: bool, pin_memory: bool) -> Loaders:
        """Open the splits.

        Raises:
            InputError: the data are not there, or not as they should be.
        """

    @abstractmethod
    def build_model(self, create: Callable[..., nn.Module], num_classes: int) -> nn.Module:
        """Build the model of so many classes; ``create`` as for ``create_model``."""

    def create_model(self, create: Callable[..., nn.Module]) -> nn.Module:
        loaders = self._loaders
        return self.build_model(create, loaders.num_classes if loaders else self.default_classes)

    def open_data(self, device: torch.device, *, is_train: bool) -> Data:
        if self.config.data.eval_split == "test":
            self._check_test_split(is_train)
            _logger.info("measuring the test split of %s", self.config.data.data_set)
        self._loaders = loaders = self.open_loaders(
            is_train=is_train, pin_memory=device.type == "cuda"
        )
        num_train = len(loaders.train.images) if loaders.train is not None else 0
        return Data(
            loaders.train,
            loaders.eval,
            f"{self.config.data.data_set}: {num_train} training and {len(loaders.eval.images)} "
            f"validation {self.samples} of {loaders.num_classes} classes",
            loaders.fingerprint(),
        )

    def _check_test_split(self, is_train: bool) -> None:
        data_set = self.config.data.data_set
        if data_set not in TEST_SETS:
            raise InputError(
                f"--eval-split test: {data_set} has no third split, as {' and '.join(TEST_SETS)} "
                "have; leave it out."
            )
        if is_train:
            raise InputError(
                "--eval-split test is for --eval: a run that is measured by it chooses its best "
                "epoch by it; leave it out to train."
            )

    def name_samples(self, epoch: int, step: int) -> Mapping[str, Sequence[int]]:
        # Seed, epoch, step and an image's place in here tell its augmentation, too.
        assert self._loaders is not None and self._loaders.train is not None
        self._loaders.train.set_epoch(epoch, start_step=step)
        return {"image_indices": [draw.image for draw in next(iter(self._loaders.train.batches))]}
