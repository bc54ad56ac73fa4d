"""Labelled sequences of tokens, and how they become batches."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ecoformer.data.datasets import Fingerprint, ImageArray, LabelledSamples, open_items
from ecoformer.data.listops import ListOps
from ecoformer.data.pathfinder import Pathfinder
from ecoformer.errors import InputError

DATA_SETS = ("LISTOPS", "PATHFINDER", "PIXELS")
# Of all data sets, those with a third split.
TEST_SETS = ("LISTOPS", "PATHFINDER")


class Sequences(LabelledSamples, Protocol):
    """Sequences with one label each.

    Attributes:
        num_words: tokens are below it.
        max_tokens: of the longest sequence.
    """

    num_words: int
    max_tokens: int

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Give a sequence, [N], int64, and its label, an index of ``class_names``."""


class Pixels:
    """Images as the grey values of their pixels, row by row."""

    num_words = 256

    def __init__(self, images: ImageArray) -> None:
        self.images = images
        self.class_names = images.class_names
        self.max_tokens = images.images[0].size

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[np.ndarray, int]:
        pixels = self.images.images[index].astype(np.int64)
        return pixels.ravel(), int(self.images.labels[index])

    def describe(self, index: int) -> str:
        return f"pixels of {self.images.describe(index)}"

    def fingerprint(self) -> Fingerprint:
        return self.images.fingerprint()


def open_sequences(name: str, path: str | None, split: str, *, max_tokens: int) -> Sequences:
    """Open one split of a data set.

    Args:
        name: one of ``DATA_SETS``.
        path: folder of Fashion-MNIST for ``"PIXELS"``, which are those of the digits without.
        split: ``"train"`` or ``"val"``, or ``"test"`` of ``TEST_SETS``.
        max_tokens: what the model has positions for; ``"LISTOPS"`` are written for it.

    Raises:
        InputError: another data set, files that are not there, or longer sequences.
    """
    sequences: Sequences
    if name == "LISTOPS":
        sequences = ListOps(split, max_tokens=max_tokens)
    elif name == "PATHFINDER":
        sequences = Pathfinder(split)
    elif name == "PIXELS":
        sequences = Pixels(open_items("DIGITS", path, split))
    else:
        raise InputError(
            f"--data-set {name} has no sequences; for --task sequence there are: "
            f"{', '.join(DATA_SETS)}."
        )
    if sequences.max_tokens > max_tokens:
        raise InputError(
            f"{sequences.describe(0)} has {sequences.max_tokens} tokens, and the model positions "
            f"for {max_tokens}; give --max-tokens {sequences.max_tokens}."
        )
    return sequences


def pad_sequences(samples: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Make a batch of sequences [N_i], int64, and labels.

    Returns:
        Tokens [B, N], int64; a key mask [B, N], true for a real token, None where all are; labels
        [B], int64.
    """
    sequences = [torch.from_numpy(tokens) for tokens, _ in samples]
    labels = torch.tensor([label for _, label in samples])
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    tokens = pad_sequence(sequences, batch_first=True)
    if bool((lengths == tokens.shape[1]).all()):
        return tokens, None, labels
    return tokens, torch.arange(tokens.shape[1]) < lengths.unsqueeze(1), labels
