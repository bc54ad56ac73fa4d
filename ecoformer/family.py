"""What the training stack, the cost model and the commands know of a backbone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ecoformer.errors import InputError, nearest_name


@dataclass(frozen=True)
class ModelFamily:
    """A backbone package seen from outside: its variants, names and recipe.

    Args:
        name: package name, e.g. ``"pvt"``.
        create_model: ``create_model(variant, attention, *, num_classes, hashing, drop_rate,
            drop_path_rate)``.
        variants: variant name to the attention kinds that it has, its default first.
        default_model: variant or released model name that a command takes when none is named.
        recipe: configuration fields whose default differs from the shared one.
        released_names: released model name to (variant, attention kind).
        timm_names: name in timm's registry to variant.
    """

    name: str
    create_model: Callable[..., nn.Module]
    variants: Mapping[str, tuple[str, ...]]
    default_model: str
    recipe: Mapping[str, object] = field(default_factory=dict)
    released_names: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    timm_names: Mapping[str, str] = field(default_factory=dict)

    def check(self, variant: str, attention: str) -> None:
        """Refuse what ``create_model`` cannot build.

        Args:
            variant: name of a variant, not a released model name.
            attention: a kind.

        Raises:
            InputError: no such variant, or the variant has no such attention.
        """
        self._require_name(variant, self.variants)
        if attention not in self.variants[variant]:
            raise InputError(
                f"{variant} has no attention kind {attention!r}; "
                f"it has: {', '.join(self.variants[variant])}."
            )

    def resolve(self, model: str, attention: str | None = None) -> tuple[str, str]:
        """Turn what a command line names into what ``create_model`` takes.

        Args:
            model: a released model name or a variant. One can be both, with another attention
                than the default of ``create_model``: released commands keep their meaning.
            attention: a kind; it wins over the one that the name implies. ``None`` takes that
                one, or the first that the variant has.

        Returns:
            The variant's name and the attention kind.

        Raises:
            InputError: no such model, or the model has no such attention.
        """
        defaults = {name: (name, kinds[0]) for name, kinds in self.variants.items()}
        names = {**defaults, **self.released_names}
        self._require_name(model, names)
        variant, implied = names[model]
        self.check(variant, attention or implied)
        return variant, attention or implied

    def _require_name(self, name: str, names: Iterable[str]) -> None:
        names = list(names)
        if name not in names:
            raise InputError(
                f"unknown {self.name} model {name!r}{nearest_name(name, names)}"
                f" It has: {', '.join(names)}."
            )


def register_with_timm(family: ModelFamily) -> None:
    """Make ``timm.create_model`` know a family by its timm names.

    Args:
        family: its ``timm_names`` become functions of the package that it is named after.
    """
    from timm.models import register_model

    package = sys.modules[family.name]
    for timm_name, variant in family.timm_names.items():
        entrypoint = _make_entrypoint(family, timm_name, variant)
        setattr(package, timm_name, entrypoint)
        register_model(entrypoint)


def _make_entrypoint(family: ModelFamily, timm_name: str, variant: str) -> Callable[..., nn.Module]:
    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: object = None,
        pretrained_cfg_overlay: object = None,
        cache_dir: object = None,
        **kwargs: Any,
    ) -> nn.Module:
        # The zoo stands above this module.
        from ecoformer.checkpoint import load_checkpoint
        from ecoformer.checkpoint.zoo import IMAGENET_MEAN, IMAGENET_STD

        kind = kwargs.pop("attention", family.variants[variant][0])
        model = family.create_model(variant, kind, **kwargs)
        if pretrained:
            load_checkpoint(model, timm_name)
        model.pretrained_cfg = model.default_cfg = {  # type: ignore[assignment]
            "architecture": timm_name,
            "input_size": (3, 224, 224),
            "num_classes": model.num_classes,
            "crop_pct": 224 / 256,
            "interpolation": "bicubic",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "classifier": "head",
        }
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = timm_name
    entrypoint.__module__ = family.name
    entrypoint.__doc__ = (
        f"timm entry point of {variant}; keywords as for create_model. Pretrained weights are "
        "those that the zoo has under this name; another number of classes gets a fresh head."
    )
    return entrypoint
