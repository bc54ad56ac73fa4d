"""Compare a file with the model that it was made of.

Shapes: B batch, H heads, N tokens, D head dim, K hash bits.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ecoformer.errors import EXIT_FAILED
from ecoformer.hashing import KernelHash, hash_layers
from ecoformer.ops import hash_attention, kernel_features, normalize_rows

_MAX_DIFFERENCE = 1e-4
# A hash function this close to 0, as a share of the sum of its weights' magnitudes, is a tie: other
# kernels of the same operations give it either sign.
_TIE = 1e-6


class MismatchError(ArithmeticError):
    """An exported file does not compute what its model does."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True)
class Comparison:
    """What a file gave for a batch, beside the model.

    Args:
        shape: of the batch.
        difference: of the outputs, at most. Where the file shows its codes, the model had them in
            place of its own; else images with a tie are left out.
        num_codes: that the file shows.
        num_flipped: codes that the model, given the same codes before them, has otherwise.
        farthest: of these from a tie, as a share of the sum of the magnitudes of weights.
        num_tied: images that were left out.
    """

    shape: tuple[int, ...]
    difference: float
    num_codes: int = 0
    num_flipped: int = 0
    farthest: float = 0.0
    num_tied: int = 0

    def __str__(self) -> str:
        text = f"{' x '.join(map(str, self.shape))}: outputs differ by {self.difference:.1e}"
        if self.num_codes:
            text += f", {self.num_flipped:,} of {self.num_codes:,} codes"
        if self.num_flipped:
            text += f", ties to {self.farthest:.0e}"
        if self.num_tied:
            text += f", {self.num_tied} images with ties aside"
        return text


def name_outputs(outputs: Any) -> dict[str, Tensor]:
    """Give the tensors of what a model gives by name; one alone is the ``output``."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def check_file(model: nn.Module, file: Path, batches: Sequence[Tensor]) -> list[Comparison]:
    """Run a file in a process of its own, which cannot import this package, and compare.

    Args:
        model: in eval mode.
        file: with the suffix of its format; files beside it are written.
        batches: float32.

    Raises:
        MismatchError: the file does not run, its outputs differ by more than rounding (1e-4, or
            that share of the largest), or a code differs that is no tie.
    """
    results = _run(file, {str(i): batch.numpy() for i, batch in enumerate(batches)})
    comparisons = []
    for number, batch in enumerate(batches):
        prefix = f"codes/{number}/"
        codes = [results[prefix + str(i)] for i in range(_count(results, prefix))]
        given = f"output/{number}/"
        actual = {
            name.removeprefix(given): torch.from_numpy(output)
            for name, output in results.items()
            if name.startswith(given)
        }
        comparisons.append(_compare(model, batch, actual, list(map(torch.from_numpy, codes))))
    if all(row.num_tied == row.shape[0] for row in comparisons):
        raise MismatchError("every image has a tie, so nothing was compared; export with others.")
    return comparisons


def _run(file: Path, batches: Mapping[str, Any]) -> dict[str, Any]:
    inputs, outputs = file.with_name("inputs.npz"), file.with_name("outputs.npz")
    np.savez(inputs, **batches)
    script = Path(__file__).with_name("run_file.py")
    words = [sys.executable, str(script), str(file), str(inputs), str(outputs)]
    process = subprocess.run(words, capture_output=True, text=True)
    if process.returncode:
        last = process.stderr.strip().rpartition("\n")[2]
        raise MismatchError(f"the exported file does not run by itself: {last}")
    with np.load(outputs) as results:
        return dict(results)


def _count(results: Mapping[str, Any], prefix: str) -> int:
    return sum(name.startswith(prefix) for name in results)


def _compare(
    model: nn.Module,
    batch: Tensor,
    actual: Tensor | Mapping[str, Tensor],
    codes: Sequence[Tensor],
) -> Comparison:
    with _Replay(model, codes) as replay, torch.no_grad():
        expected = name_outputs(model(batch))
    actual = name_outputs(actual)
    if actual.keys() != expected.keys():
        raise MismatchError(f"the file gives {', '.join(actual)}, the model {', '.join(expected)}.")
    if codes and replay.num_calls != len(codes):
        raise MismatchError(
            f"the file makes codes {len(codes)} times, the model {replay.num_calls} times."
        )
    is_compared = torch.ones(len(batch), dtype=torch.bool)
    if replay.num_calls and not codes:
        is_compared = replay.nearest > _TIE
    differences = {
        name: (actual[name] - output)[is_compared].abs().amax().item() if is_compared.any() else 0.0
        for name, output in expected.items()
    }
    comparison = Comparison(
        tuple(batch.shape),
        # Unlike max, keeps NaN.
        torch.tensor(list(differences.values())).amax().item(),
        num_codes=sum(bits.numel() for bits in codes),
        num_flipped=replay.num_flipped,
        farthest=replay.farthest,
        num_tied=int((~is_compared).sum()),
    )
    for name, output in expected.items():
        # Written so that NaN fails.
        if not differences[name] <= _MAX_DIFFERENCE * max(1.0, output.abs().amax().item()):
            raise MismatchError(f"the exported file differs by more than rounding: {comparison}.")
    if not replay.farthest <= _TIE:
        raise MismatchError(f"codes of the exported file differ that are no ties: {comparison}.")
    return comparison


@dataclass
class _Replay:
    """In a ``with`` block, hash functions take codes from a list in place of their own.

    Args:
        codes: of each call in turn, bool [B, H, K, N]; own ones where there are none.

    Attributes:
        nearest: of the own codes of each image to a tie, [B].
    """

    model: nn.Module
    codes: Sequence[Tensor]
    num_calls: int = 0
    num_flipped: int = 0
    farthest: float = 0.0
    nearest: Tensor = field(default_factory=lambda: torch.tensor(torch.inf))

    def __enter__(self) -> _Replay:
        layers = hash_layers(self.model).values()
        self._handles = [layer.register_forward_hook(self._replace) for layer in layers]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _replace(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        assert isinstance(layer, KernelHash)
        q, v, key_mask = (*args, None)[:3]
        features = kernel_features(normalize_rows(q), layer.anchors, key_mask)
        projected = layer.weight @ (features - layer.kernel_mean.unsqueeze(-1))  # [B, H, K, N]
        # A function that is 0 everywhere ties everywhere.
        scale = layer.weight.abs().sum(-1, keepdim=True)
        distance = projected.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        self.num_calls += 1
        if self.num_calls > len(self.codes):
            self.nearest = torch.minimum(self.nearest, distance.flatten(1).amin(1))
            return out
        bits = self.codes[self.num_calls - 1]
        flipped = (projected > 0) != bits
        if flipped.any():
            self.num_flipped += int(flipped.sum())
            self.farthest = max(self.farthest, distance[flipped].max().item())
        return hash_attention(bits.mT * 2.0 - 1.0, v, layer.config.value_bias, key_mask=key_mask)
