"""Load weights into a model: its own, the released ones, or those of an earlier stage."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

from torch import Tensor, nn

from ecoformer.checkpoint.conversion import Conversion
from ecoformer.checkpoint.files import read_checkpoint, unwrap_state
from ecoformer.checkpoint.layout import (
    HASH_ANCHORS,
    HASH_WEIGHT,
    IS_FITTED,
    PROJECTION,
    owner_of,
    to_ours,
)
from ecoformer.checkpoint.zoo import resolve_source
from ecoformer.errors import InputError
from ecoformer.hashing.kernel_hash import read_flag


@dataclass(frozen=True)
class LoadReport:
    """What became of each entry of a weight file and of the model; ``str`` tells it in words.

    Args:
        loaded: entries of the model that were taken by equal name (in our layout).
        derived: entries of the model that were made from others of the file.
        dropped: entries of the file that a rule leaves out; ``[k]`` is the middle third of qkv.
        missing: entries of the model that kept their values, but for hash functions.
        unused: entries of the file that nothing asked for.
    """

    source: str
    loaded: tuple[str, ...]
    derived: tuple[str, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = [
            f"{len(names)} {what} ({_summarise(names)})"
            for what, names in (
                ("derived", self.derived),
                ("dropped by rule", self.dropped),
                ("left as they were", self.missing),
                ("unused", self.unused),
            )
            if names
        ]
        counts.insert(0, f"{len(self.loaded)} entries loaded by name")
        return ". ".join([f"{self.source}: {', '.join(counts)}", *self.notes]) + "."


def load_checkpoint(
    model: nn.Module,
    source: str | PathLike[str] | Mapping[str, object],
    *,
    strict: bool = False,
    allow_missing: bool = False,
    origin: str = "the state dict",
) -> LoadReport:
    """Load weights into a model, or leave it as it was if they do not fit.

    Weights of an earlier stage are converted, as the classes of the model's attention layers say:
    original ones (spatial reduction) to softmax, softmax to shared-qk softmax, Performer or
    EcoFormer. Other precisions are cast to the model's. Hash functions of a released file are
    fitted.

    Args:
        model: not wrapped for several devices.
        source: a path, URL, zoo name, state dict or training dictionary, in our layout or the
            released one.
        strict: model and file must hold the same entries, head and hash functions included, with
            nothing converted and nothing left fresh: for evaluation, and to go on with a run.
        allow_missing: backbone weights that have no source may keep their present values; not
            with ``strict``.
        origin: what messages call a ``source`` that is a dictionary.

    Raises:
        InputError: the source cannot be read, does not fit, or holds NaN or infinity; or
            ``strict`` and ``allow_missing`` are both given.

    Source: EcoFormer and the file layout of the released implementation.
    """
    if strict and allow_missing:
        raise InputError("strict lets nothing be missing; give strict or allow_missing, not both.")
    notes: list[str] = []
    if isinstance(source, Mapping):
        raw = unwrap_state(source, origin)["model"]
    else:
        origin = str(source)
        checkpoint = read_checkpoint(resolve_source(source))
        raw, notes = checkpoint["model"], [*checkpoint.notes]
    state = to_ours(raw)
    for name, flag in state.items():
        owner = owner_of(name, IS_FITTED)
        if owner is not None:
            state[name] = read_flag(flag, state.get(owner + HASH_ANCHORS), f"{origin}: {owner}hash")
    target = model.state_dict()
    if not strict:
        notes += _resample_positions(model, state)

    conversion = Conversion(model, state)
    found = {name: conversion.find(name, may_derive=not strict) for name in target}
    entries = {name: entry for name, entry in found.items() if entry is not None}
    taken = {name: entry.tensor for name, entry in entries.items()}
    sources = {name: entry.sources for name, entry in entries.items()}

    dropped = [name for name in raw if owner_of(name, PROJECTION) is not None and name not in state]
    # Two projections made of one entry leave out the same.
    dropped += dict.fromkeys(left for entry in entries.values() for left in entry.leftovers)
    head = name_head(model)
    if not strict:
        for name in head:
            if name in taken and _has_other_classes(taken[name], target[name]):
                told = _tell_classes(taken[name], target[name], _outputs_a_class(model))
                note = f"The head is fresh: {told}"
                notes += [note] if note not in notes else []
                dropped.append(name)
                del taken[name]

    used = {source for name in taken for source in sources[name]}
    match = _Match(
        origin=origin,
        head=head,
        outputs_a_class=_outputs_a_class(model),
        target=target,
        taken=taken,
        missing=[
            name
            for name in target
            if name not in taken and (strict or not conversion.is_own(name, taken))
        ],
        unused=[name for name in state if name not in used and name not in dropped],
        conversion=conversion,
    )
    match.require_fit(strict=strict, allow_missing=allow_missing)
    model.load_state_dict(
        {name: _cast(taken[name], target[name], f"{origin}: {name}") for name in taken},
        strict=False,
    )

    hashes = [buffer for name, buffer in target.items() if owner_of(name, IS_FITTED) is not None]
    num_unfitted = sum(not is_fitted for is_fitted in hashes)
    if num_unfitted:
        notes.append(f"{num_unfitted} of {len(hashes)} hash functions are not fitted yet")
    return LoadReport(
        source=origin,
        loaded=tuple(name for name in taken if sources[name] == (name,)),
        derived=tuple(name for name in taken if sources[name] != (name,)),
        dropped=tuple(dropped),
        missing=tuple(match.missing),
        unused=tuple(match.unused),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Match:
    """What a file has for a model, entry by entry."""

    origin: str
    head: Sequence[str]
    outputs_a_class: int
    target: Mapping[str, Tensor]
    taken: Mapping[str, Tensor]
    missing: Sequence[str]
    unused: Sequence[str]
    conversion: Conversion

    def require_fit(self, *, strict: bool, allow_missing: bool) -> None:
        """Raise an InputError, as telling as can be, if file and model do not belong together."""
        taken, target, missing = self.taken, self.target, self.missing
        if not strict:
            # Some entry has to fit, even where all may be missing.
            is_enough = allow_missing and taken
            missing = [] if is_enough else [name for name in missing if name not in self.head]
        mismatched = [name for name in taken if taken[name].shape != target[name].shape]
        if mismatched and not missing:
            self._refuse_other_head(mismatched)
            self._refuse_other_hashing(mismatched)
        problems = []
        if mismatched:
            name = mismatched[0]
            problems.append(
                f"{len(mismatched)} of the model's {len(target)} entries have another shape, first "
                f"{name}: {list(taken[name].shape)} in the file, {list(target[name].shape)} here"
            )
        if missing:
            problems.append(
                f"{len(missing)} of the model's {len(target)} have no source, first {missing[0]}"
            )
        # An entry too many of a sort that the model has comes from a deeper one.
        sorts = {_strip_numbers(name) for name in target}
        surplus = [
            name
            for name in self.unused
            if strict
            or problems
            or _strip_numbers(name) in sorts
            or self.conversion.is_foreign(name)
        ]
        if surplus:
            problems.append(f"{len(surplus)} of the file's fit nowhere, first {surplus[0]}")
        if problems:
            raise InputError(
                f"{self.origin}: weights of another model: {'; '.join(problems)}; choose the model "
                "and attention that it was made with (--task, --model, --attn_type)"
                + (", or start from it with --finetune." if strict else ".")
            )

    def _refuse_other_head(self, mismatched: Sequence[str]) -> None:
        theirs, ours = self.taken[mismatched[0]], self.target[mismatched[0]]
        if all(name in self.head for name in mismatched) and _has_other_classes(theirs, ours):
            raise InputError(
                f"{self.origin}: {_tell_classes(theirs, ours, self.outputs_a_class)}; take data "
                "with as many classes, or start from it with --finetune, which makes a new head."
            )

    def _refuse_other_hashing(self, mismatched: Sequence[str]) -> None:
        theirs, ours = self.taken[mismatched[0]], self.target[mismatched[0]]
        # [H, K, M] with the same heads, in a file that fits in all but hash functions.
        is_hash_weight = owner_of(mismatched[0], HASH_WEIGHT) is not None
        has_same_heads = theirs.shape[:-2] == ours.shape[:-2]
        if is_hash_weight and has_same_heads and all(map(self.conversion.is_own, mismatched)):
            (bits, anchors), (our_bits, our_anchors) = theirs.shape[-2:], ours.shape[-2:]
            raise InputError(
                f"{self.origin}: hash functions of {bits} bits and {anchors} anchors, the model's "
                f"have {our_bits} and {our_anchors}; pass --nbits {bits} --anchor {anchors}."
            )


def _resample_positions(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Fit positions [1, tokens, C] of one of timm's models to its images; say so in a note."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    ours, theirs = getattr(model, "pos_embed", None), state.get("pos_embed")
    if not (isinstance(grid, tuple) and isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return []
    if ours.ndim != 3 or theirs.ndim != 3 or ours.shape[1] == theirs.shape[1]:
        return []
    # Of class tokens and the like, which may have positions of their own.
    num_prefix = ours.shape[1] - math.prod(grid)
    side = math.isqrt(max(theirs.shape[1] - num_prefix, 0))
    if num_prefix < 0 or side**2 + num_prefix != theirs.shape[1]:
        return []
    from timm.layers import resample_abs_pos_embed

    state["pos_embed"] = resample_abs_pos_embed(theirs, list(grid), num_prefix_tokens=num_prefix)
    return [f"Positions are resampled from {side} x {side} to {grid[0]} x {grid[1]} patches"]


def name_head(model: nn.Module) -> list[str]:
    """Entries of the classifier: of ours, or of what timm says of a model of its own."""
    config = getattr(model, "pretrained_cfg", None)
    names = config.get("classifier") if isinstance(config, Mapping) else None
    names = names or "head"
    modules = [names] if isinstance(names, str) else names
    return [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]


def count_classes(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Count the classes that weights tell apart, in our layout, of a model like this one."""
    name, *_ = name_head(model)
    return len(state.get(name, ())) // _outputs_a_class(model)


def _has_other_classes(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two entries of heads differ in the number of classes alone."""
    if theirs.ndim != ours.ndim or theirs.shape[1:] != ours.shape[1:]:
        return False
    return len(theirs) != len(ours)


def _tell_classes(theirs: Tensor, ours: Tensor, outputs_a_class: int) -> str:
    given, wanted = (len(head) // outputs_a_class for head in (theirs, ours))
    return f"{given} classes in the file, {wanted} in the model"


def _outputs_a_class(model: nn.Module) -> int:
    """Of a detector, as many as anchors at a place."""
    outputs: int = getattr(model, "outputs_a_class", 1)
    return outputs


def _cast(tensor: Tensor, like: Tensor, what: str) -> Tensor:
    """Bring a tensor to the dtype of the model's, if it is sound."""
    if tensor.is_floating_point() != like.is_floating_point():
        raise InputError(f"{what} is {tensor.dtype}, expected {like.dtype}; save it as that.")
    tensor = tensor.to(like.dtype)
    require_finite(tensor, what)
    return tensor


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and infinity by an InputError that calls the tensor ``what``."""
    if not tensor.isfinite().all():
        raise InputError(f"{what} holds NaN or infinity; go back to an earlier checkpoint.")


def _summarise(names: Sequence[str]) -> str:
    """Name up to four kinds of entries: layers alike in all blocks count as one."""
    kinds = [re.sub(r"^.*?(?=attn\.)|\.(weight|bias)", "", name) for name in names]
    kinds = list(dict.fromkeys(map(_strip_numbers, kinds)))
    return ", ".join(kinds[:4] + ["..."] * (len(kinds) > 4))


def _strip_numbers(name: str) -> str:
    """Make entries of one kind alike, whatever their stage and block."""
    return re.sub(r"\d+", "*", name)
