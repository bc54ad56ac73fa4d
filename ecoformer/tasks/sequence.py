"""Classification of sequences, padded to the longest of a batch and masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ecoformer.config.recipes import NOT_AUGMENTED
from ecoformer.data import Loaders, load_splits
from ecoformer.data.sequences import Sequences, open_sequences, pad_sequences
from ecoformer.ranks import rank, world_size
from ecoformer.tasks.classification import Classification

# Of a model that is built without data.
_NUM_WORDS = 256


class SequenceClassification(Classification):
    """Batches are tokens [B, N], int64, a key mask [B, N] or None, and labels [B], int64.

    Raises:
        InputError: a setting that has a meaning for images alone.
    """

    samples = "sequences"
    inputs = "tokens"
    default_classes = 10
    sizes = ("max_tokens",)
    without_meaning = NOT_AUGMENTED

    def explain(self, off: object) -> str:
        return "images, and this task has sequences; leave it out."

    def open_loaders(self, *, is_train: bool, pin_memory: bool) -> Loaders:
        data, max_tokens = self.config.data, self.config.model.max_tokens
        names = {"train": "train", "val": "val"} if is_train else {"val": data.eval_split}
        splits = {
            use: open_sequences(data.data_set, data.data_path, name, max_tokens=max_tokens)
            for use, name in names.items()
        }
        return load_splits(
            splits,
            dict.fromkeys(splits, _keep),
            data,
            seed=self.config.run.seed,
            rank=rank(),
            world_size=world_size(),
            pin_memory=pin_memory,
            collate=pad_sequences,
        )

    def build_model(self, create: Callable[..., nn.Module], num_classes: int) -> nn.Module:
        num_words = _NUM_WORDS
        if self._loaders is not None:
            num_words = cast(Sequences, self._loaders.eval.images).num_words
        max_tokens = self.config.model.max_tokens
        return create(num_classes=num_classes, num_words=num_words, max_tokens=max_tokens)

    def fit_inputs(self, batch: Any) -> Any:
        return tuple(batch[:-1])

    def draw_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor]:
        shape = (batch_size, self.config.model.max_tokens)
        return (torch.randint(_NUM_WORDS, shape, generator=generator),)

    def describe_inputs(self) -> str:
        return f"{self.config.model.max_tokens} tokens"


def _keep(tokens: Any, label: int) -> tuple[Any, int]:
    return tokens, label
