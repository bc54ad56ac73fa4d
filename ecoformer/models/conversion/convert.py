"""Turn the softmax attention of a model into EcoFormer layers, in place and all or nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ecoformer.attention import EcoFormerAttention
from ecoformer.errors import InputError, suggest
from ecoformer.hash_config import HashConfig
from ecoformer.models.conversion.forms import Form, find_base, find_form, find_kept, name_class
from ecoformer.models.conversion.layer import ConvertedAttention, find_misfit
from ecoformer.models.conversion.report import ConversionReport, advise, describe

Select: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]

# Of classes that nobody here has read.
_SOUNDS_LIKE_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_NOT_SELECTED = "not selected"


def convert(
    model: nn.Module, hashing: HashConfig | None = None, select: Select | None = None
) -> ConversionReport:
    """Replace softmax self-attention by EcoFormer attention, in place.

    The weights of queries and values stay bit for bit, those of the keys go; all else of the model
    is what it was: output projections, training mode, devices, dtypes, ``requires_grad``. An
    optimiser, a wrapper for several devices and ``torch.compile`` come after it, and so does
    ``fit_hash_functions``.

    Args:
        hashing: the published settings where None.
        select: layers by their names or those of modules around them, or a predicate of name and
            layer; every layer where None.

    Raises:
        InputError: there is nothing to convert, a named layer has no linear form, or layers share
            a module or weights. The model is as it was.

    Source: EcoFormer, arXiv 2209.09004.
    """
    hashing = HashConfig() if hashing is None else hashing
    _check(model, hashing)
    layers = _find_layers(model)
    chosen, named = _choose(model, layers, select)
    kept: dict[str, str] = {}
    for name, found in layers.items():
        doubt = None if name in named else found.doubt
        if found.obstacle or doubt or name not in chosen:
            kept[name] = found.obstacle or (name in chosen and doubt) or _NOT_SELECTED
    plan = {name: layer for name, layer in layers.items() if name not in kept}
    if not plan:
        raise InputError(_tell_nothing(model, kept))
    _refuse_sharing(model, layers, plan)
    # All are made before the first is put in its place: what fails leaves the model as it was.
    made = {
        name: ConvertedAttention(found.form, found.layer, hashing)
        for name, found in plan.items()
        if found.form is not None
    }
    report = ConversionReport(
        converted={name: describe(plan[name].layer, layer) for name, layer in made.items()},
        kept=kept,
        advice=advise(model, made.values()),
    )
    for name, layer in made.items():
        holders = plan[name].holders
        setattr(holders[-1], name.rpartition(".")[2], layer)
        layer.form.settle(holders)
    return report


@dataclass(frozen=True)
class _Found:
    """Softmax attention of a model; ``holders`` are the modules around it, nearest last."""

    layer: nn.Module
    holders: tuple[nn.Module, ...]
    form: Form | None
    # Why it has no linear form, and why it may not have one: then it has to be named.
    obstacle: str | None
    doubt: str | None = None


def _check(model: nn.Module, hashing: HashConfig) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"convert takes a torch.nn.Module, not a {type(model).__name__}.")
    if not isinstance(hashing, HashConfig):
        raise InputError(
            "hashing is an ecoformer.HashConfig, as HashConfig(num_bits=8), not a "
            f"{type(hashing).__name__}."
        )
    for module in model.modules():
        is_compiled = type(module).__name__ == "OptimizedModule"
        if is_compiled or isinstance(module, (DataParallel, DistributedDataParallel)):
            raise InputError(
                f"the model is wrapped in {type(module).__name__}, which would not know of new "
                "weights; convert it before it is wrapped."
            )
    if find_form(model) or isinstance(model, EcoFormerAttention):
        raise InputError(
            f"a {type(model).__name__} cannot be replaced inside of itself; give the model that "
            "holds it, as torch.nn.Sequential(layer)."
        )


def _find_layers(model: nn.Module) -> dict[str, _Found]:
    """All attention that is not EcoFormer's by name, in the order of modules."""
    found: dict[str, _Found] = {}
    # Of these names: attention itself, what holds it, or what stands inside of it.
    known: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        form, reason = find_form(module), find_kept(module)
        if name.startswith(tuple(f"{outer}." for outer in known)):
            continue
        if isinstance(module, EcoFormerAttention):
            known.append(name)
        elif form is not None or reason is not None:
            holders = _find_holders(model, name)
            doubt = None
            if form is not None:
                reason = form.find_obstacle(module, holders) or find_misfit(form, module)
                doubt = form.find_doubt(holders)
            found[name] = _Found(module, holders, form, reason, doubt)
            known.append(name)
        elif _may_be_attention(name, module):
            reason = f"no adapter knows {name_class(module)}: register a Form for it"
            found[name] = _Found(module, (), None, reason)
    # A class of that name that holds attention is not the attention itself.
    names = (*found, *known)
    return {
        name: layer
        for name, layer in found.items()
        if not any(other.startswith(f"{name}.") for other in names)
    }


def _may_be_attention(name: str, module: nn.Module) -> bool:
    """Whether a class that nobody here has read builds on attention, or is called so."""
    if find_base(module) or _SOUNDS_LIKE_ATTENTION.search(type(module).__name__):
        return True
    has_projections = any(isinstance(child, nn.Linear) for child in module.children())
    return has_projections and bool(_SOUNDS_LIKE_ATTENTION.search(name.rpartition(".")[2]))


def _find_holders(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    parts = name.split(".")
    return tuple(model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))


def _choose(
    model: nn.Module, layers: dict[str, _Found], select: Select | None
) -> tuple[set[str], set[str]]:
    """Names of the layers that were asked for, and of those asked for by their own name."""
    if select is None:
        return set(layers), set()
    if callable(select):
        return {name for name, found in layers.items() if select(name, found.layer)}, set()
    if not isinstance(select, Iterable):
        raise InputError(
            f"select holds names of modules, or is a predicate, not a {type(select).__name__}."
        )
    names = [select] if isinstance(select, str) else list(select)
    known = dict(model.named_modules(remove_duplicate=False))
    chosen: set[str] = set()
    for name in names:
        if name not in known:
            raise InputError(
                f"select holds names of modules, or is a predicate; the model has no {name!r}"
                f"{suggest(str(name), known)}"
            )
        inside = {layer for layer in layers if not name or f"{layer}.".startswith(f"{name}.")}
        if not inside:
            raise InputError(f"select: {name} holds no softmax attention.")
        if name in layers and layers[name].obstacle:
            raise InputError(f"select: {name} cannot be converted: {layers[name].obstacle}.")
        chosen |= inside
    return chosen, chosen.intersection(names)


def _tell_nothing(model: nn.Module, kept: dict[str, str]) -> str:
    """Say why there is nothing to convert."""
    reasons = {name: reason for name, reason in kept.items() if reason != _NOT_SELECTED}
    if len(reasons) < len(kept):
        return "no layer was selected, so there is nothing to convert."
    if any(isinstance(module, EcoFormerAttention) for module in model.modules()):
        return "the model is converted already: its attention is EcoFormer's."
    if not kept:
        return (
            f"{type(model).__name__} has no softmax self-attention, so there is nothing to convert."
        )
    name, reason = next(iter(reasons.items()))
    return (
        f"none of the {len(kept)} attention layers of {type(model).__name__} has a linear form; "
        f"first {name}: {reason}."
    )


def _refuse_sharing(model: nn.Module, layers: dict[str, _Found], plan: dict[str, _Found]) -> None:
    """Refuse layers that occur twice, if in one place alone, or whose parameters others use too."""
    places: dict[int, str] = {}
    for name, found in layers.items():
        other = places.setdefault(id(found.layer), name)
        if other != name and (name in plan or other in plan):
            raise InputError(
                f"{other} and {name} are one and the same module, and hash functions of one place "
                "do not fit another; give each its own copy (copy.deepcopy) first."
            )
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(id(module))
    for name, found in plan.items():
        inside = {id(module) for module in found.layer.modules()}
        for entry, parameter in found.layer.named_parameters():
            if not owners[id(parameter)] <= inside:
                raise InputError(
                    f"{name}.{entry} is used by another module too, and would not be any more; "
                    "give each its own copy first."
                )
