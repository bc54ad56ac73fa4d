"""What the training stack, the cost model and the commands know of a backbone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ecoformer.errors import InputError, suggest

if TYPE_CHECKING:
    from timm.models import PretrainedCfg


@dataclass(frozen=True)
class ModelFamily:
    """A backbone package seen from outside: its variants, names and recipe.

    Args:
        name: package name, e.g. ``"pvt"``.
        create_model: ``create_model(variant, attention, *, num_classes, hashing, in_chans,
            drop_rate, drop_path_rate)``.
        variants: variant name to the attention kinds that it has, its default first.
        default_model: variant or released model name that a command takes when none is named.
        recipe: configuration fields whose default differs from the shared one.
        released_names: released model name to (variant, attention kind).
        timm_names: name in timm's registry to variant.
        foreign_prefixes: how names begin that belong to another package, to that package.
    """

    name: str
    create_model: Callable[..., nn.Module]
    variants: Mapping[str, tuple[str, ...]]
    default_model: str
    recipe: Mapping[str, object] = field(default_factory=dict)
    released_names: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    timm_names: Mapping[str, str] = field(default_factory=dict)
    foreign_prefixes: Mapping[str, str] = field(default_factory=dict)

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
            f"unknown {self.name} model {name!r}{suggest(name, names)} It has: {', '.join(names)}."
        )


def register_with_timm(family: ModelFamily) -> None:
    """Make ``timm.create_model`` know a family by its timm names, and ``timm.list_models`` too.

    Args:
        family: its ``timm_names`` become functions of the package that it is named after.
    """
    from timm.models import register_model

    # The zoo stands above this module.
    from ecoformer.checkpoint.zoo import ZOO

    package = sys.modules[family.name]
    weights = {name: ZOO[name].timm_config() for name in family.timm_names if name in ZOO}
    # Where timm looks for what it calls a model's pretrained configuration.
    configs = {name: {"classifier": "head", **weights.get(name, {})} for name in family.timm_names}
    setattr(package, "default_cfgs", configs)  # noqa: B010
    for timm_name, variant in family.timm_names.items():
        entrypoint = _make_entrypoint(family, timm_name, variant)
        setattr(package, timm_name, entrypoint)
        register_model(entrypoint)


def _make_entrypoint(family: ModelFamily, timm_name: str, variant: str) -> Callable[..., nn.Module]:
    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        attention: str | None = None,
        features_only: bool = False,
        **kwargs: Any,
    ) -> nn.Module:
        from timm.models import build_model_with_cfg, resolve_pretrained_cfg

        config = resolve_pretrained_cfg(timm_name, pretrained_cfg, pretrained_cfg_overlay)

        def build(**keywords: Any) -> nn.Module:
            model = family.create_model(
                variant, attention or family.variants[variant][0], **keywords
            )
            if pretrained:
                _load_pretrained(model, config, cache_dir)
            return model

        if features_only:
            kwargs |= {"features_only": True, "num_classes": 0}
        # Weights are loaded while it builds: timm's own loading verifies nothing.
        return build_model_with_cfg(
            build,
            timm_name,
            pretrained=False,
            pretrained_cfg=config.to_dict(),
            feature_cfg={"feature_cls": "getter", "out_indices": (0, 1, 2, 3)},
            **kwargs,
        )

    entrypoint.__name__ = entrypoint.__qualname__ = timm_name
    entrypoint.__module__ = family.name
    entrypoint.__doc__ = (
        f"timm entry point of {variant}; keywords as for create_model. Pretrained weights are "
        "those that the zoo has under this name; another number of classes gets a fresh head."
    )
    return entrypoint


def _load_pretrained(model: nn.Module, config: PretrainedCfg, cache_dir: str | None) -> None:
    """Load what timm's configuration names: a state dict, a file, a URL, or else the zoo's."""
    from timm.models import adapt_input_conv

    from ecoformer.checkpoint import load_checkpoint, read_checkpoint, resolve_source

    origin, state = "the state dict", config.state_dict
    if state is None:
        if config.hf_hub_id and not config.file:
            raise InputError(
                f"{config.hf_hub_id}: weights of the Hugging Face hub are not fetched here; "
                "download them and pass pretrained_cfg_overlay={'file': FILE}."
            )
        # The architecture's name has no weights then, which is what the zoo says of it.
        origin = str(config.file or config.url or config.architecture)
        state = read_checkpoint(resolve_source(origin, cache_dir))["model"]
    # As timm does: colours are summed up for grey images, and repeated for more channels.
    stem, weight = next((n, p) for n, p in model.named_parameters() if p.ndim == 4)
    theirs, in_chans = state.get(stem), weight.shape[1]
    if theirs is not None and theirs.ndim == 4 and theirs.shape[1] == 3 != in_chans:
        state = {**state, stem: adapt_input_conv(in_chans, theirs)}
    load_checkpoint(model, state, origin=origin)
