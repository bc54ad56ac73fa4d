"""The families of models by name. Without PyTorch: help and wrong flags need none."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ecoformer.errors import InputError, suggest

if TYPE_CHECKING:
    from torch import nn

_BACKBONES = ["twins.family", "pvt.family"]
# Modules with a FAMILY each; a package of one's own can be appended. Of two with one name the later
# is taken: timm, which has names of its own for all of ours, is asked last.
FAMILIES = [
    "ecoformer.models.timm_family",
    "ecoformer.models.encoder_family",
    "ecoformer.models.vit_family",
    *_BACKBONES,
]


@dataclass(frozen=True)
class Layout:
    """Attention kinds that the blocks of a stage take in turn, under one name."""

    label: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class ModelFamily:
    """A backbone package seen from outside: its variants, names and recipe.

    Args:
        name: of the package, whose ``create_model`` builds the models.
        variants: name to the kinds and layouts that it was published with, its default first.
        default_model: variant or released model name that a command takes when none is named.
        inputs: what a model is called with: ``"images"`` [B, C, height, width], or ``"tokens"``
            [B, N] and their key mask.
        task: the one whose runs take ``default_model`` where they name none.
        recipe: configuration fields whose default differs from the shared one.
        released_names: released model name to (variant, kind or layout).
        timm_names: name in timm's registry to variant.
        first_conv: module that takes the image, by its name in the models.
        drop_rates: keywords of ``create_model`` that the released ``--drop`` stands for.
        foreign_prefixes: how names begin that belong to another package, to that package.
    """

    name: str
    variants: Mapping[str, tuple[str, ...]]
    default_model: str
    inputs: str = "images"
    task: str | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    recipe: Mapping[str, object] = field(default_factory=dict)
    released_names: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    timm_names: Mapping[str, str] = field(default_factory=dict)
    first_conv: str = ""
    drop_rates: tuple[str, ...] = ("proj_drop_rate",)
    foreign_prefixes: Mapping[str, str] = field(default_factory=dict)

    def create_model(
        self,
        variant: str,
        attention: str | None = None,
        *,
        input_size: int | None = None,
        **keywords: Any,
    ) -> nn.Module:
        """Build a model with fresh weights, by the package's function of this name.

        Args:
            attention: the variant's default where None.
            input_size: image side, pixels, of families whose models are made for one size.

        Raises:
            InputError: the family lacks the model or the attention, or the model a keyword.
        """
        attention = attention or self.kinds(variant)[0]
        build = import_module(self.name).create_model
        try:
            model: nn.Module = build(variant, attention, **keywords)
        except TypeError as error:
            if not any(f"'{name}'" in str(error) for name in keywords):
                raise
            raise InputError(f"{variant} cannot be built so: {error}.") from error
        return model

    def create_empty(
        self, variant: str, attention: str | None = None, **keywords: Any
    ) -> nn.Module:
        """Build a model on the meta device: to count a cost, weights need not be drawn."""
        import torch

        with torch.device("meta"):
            return self.create_model(variant, attention, **keywords)

    def kinds(self, variant: str) -> tuple[str, ...]:
        """Kinds and layouts of a variant: the published ones, then those that a user registered."""
        self._require_name(variant, self.variants)
        published = self.variants[variant]
        return published + tuple(kind for kind in _list_added() if kind not in published)

    def label(self, attention: str) -> str:
        """What tables and plots call a kind or layout."""
        from ecoformer.attention import attention_class

        layout = self.layouts.get(attention)
        return attention_class(attention).label if layout is None else layout.label

    def check(self, variant: str, attention: str) -> None:
        """Refuse, by an InputError, what ``create_model`` cannot build."""
        kinds = self.kinds(variant)
        if attention not in kinds:
            raise InputError(
                f"{variant} has no attention kind {attention!r}; it has: {', '.join(kinds)}."
            )

    def resolve(self, model: str, attention: str | None = None) -> tuple[str, str]:
        """Turn what a command line names into a variant and its attention.

        A name can be a variant's and a released one, which implies another attention: released
        commands keep their meaning. ``attention`` beats what the name implies.

        Raises:
            InputError: no such model, or the model has no such attention.
        """
        defaults = {name: (name, kinds[0]) for name, kinds in self.variants.items()}
        names = {**defaults, **self.released_names}
        self._require_name(model, names)
        variant, implied = names[model]
        self.check(variant, attention or implied)
        return variant, attention or implied

    def describe_names(self) -> str:
        """List the names that a command line may give, in a few words where they are many."""
        return ", ".join(dict.fromkeys((*self.variants, *self.released_names)))

    def _require_name(self, name: str, names: Collection[str]) -> None:
        if name in names:
            return
        for prefix, package in self.foreign_prefixes.items():
            if name.startswith(prefix):
                raise InputError(
                    f"{name!r} is a model of {package}, and this is {self.name}; use "
                    f"python -m {package}.main, or import {package}."
                )
        raise InputError(
            f"unknown {self.name} model {name!r}{suggest(name, names)} It has: "
            f"{self.describe_names()}."
        )


def _list_families() -> list[ModelFamily]:
    """In the order in which they are asked."""
    return [import_module(module).FAMILY for module in reversed(FAMILIES)]


def find_default_family(task: str) -> ModelFamily:
    """Find the family that a task takes where no model is named; an InputError where none is."""
    for family in _list_families():
        if family.task == task:
            return family
    raise InputError("name a model, for example --model pvt_v2_b0.")


def find_family(model: str) -> ModelFamily:
    """Find the family of a variant or released model name; an InputError where none has it."""
    families = _list_families()
    for family in families:
        if model in family.variants or model in family.released_names:
            return family
    names = [name for family in families for name in (*family.variants, *family.released_names)]
    known = ", ".join(family.describe_names() for family in families)
    raise InputError(f"unknown model {model!r}{suggest(model, names)} There are: {known}.")


def list_variants() -> list[str]:
    """Names of the variants of the backbones that come along."""
    return [
        name for module in reversed(_BACKBONES) for name in import_module(module).FAMILY.variants
    ]


def _list_added() -> list[str]:
    """Kinds that every backbone takes. Published ones are not among them."""
    # Where nothing has imported this, nothing has registered a kind: PyTorch can stay away.
    attention = sys.modules.get("ecoformer.attention")
    if attention is None:
        return []
    kinds: tuple[str, ...] = attention.attention_kinds()
    return [kind for kind in kinds if attention.attention_class(kind).any_backbone]
