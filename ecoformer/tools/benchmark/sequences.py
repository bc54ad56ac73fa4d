"""Time training steps of the sequence encoder over a range of lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import find_family
from ecoformer.tools.benchmark.backbones import prepare_step
from ecoformer.tools.benchmark.comparison import Comparison, Contender, Setup, compare_lengths
from ecoformer.tools.benchmark.measurements import Measurement
from ecoformer.tools.measure import Call

TASK = "sequence encoder, training step"
# Below, what does not grow with N is a part of the time.
SLOPE_FROM = 2048
_KINDS = ("ecoformer", "msa", "performer")
_NUM_CLASSES, _NUM_WORDS = 10, 256
_SLOW_SECONDS = 60.0


def build_step(
    kind: str, batch_size: int, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> Call:
    """Prepare a step of the encoder of ListOps: random weights, tokens and hash functions.

    No token is padding.
    """
    torch.manual_seed(0)
    sizes = {"num_classes": _NUM_CLASSES, "num_words": _NUM_WORDS, "max_tokens": num_tokens}
    model = find_family("encoder").create_model("encoder", kind, **sizes)
    model = with_random_hash_functions(model).to(device).train()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(_NUM_WORDS, (batch_size, num_tokens), generator=generator)
    return prepare_step(model, model, tokens.to(device), dtype, _NUM_CLASSES)


def measure_sequences(
    setup: Setup, *, batch_size: int, token_counts: Sequence[int]
) -> Iterator[list[Measurement]]:
    """Compare attention kinds over N.

    Args:
        token_counts: N, rising.
    """

    def line_up(num_tokens: int, too_slow: Mapping[str, str]) -> Comparison:
        sizes = (batch_size, num_tokens, setup.device, setup.dtype)
        return Comparison(
            setup,
            TASK,
            [
                Contender(kind, partial(build_step, kind, *sizes), why_not=too_slow.get(kind, ""))
                for kind in _KINDS
            ],
            batch_size=batch_size,
            num_tokens=num_tokens,
        )

    yield from compare_lengths(line_up, token_counts, slow_seconds=_SLOW_SECONDS)
