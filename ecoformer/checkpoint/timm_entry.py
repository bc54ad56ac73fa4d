"""Our models in timm's registry, with the weights of the zoo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from timm.models import (
    FeatureGraphNet,
    PretrainedCfg,
    adapt_input_conv,
    build_model_with_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from ecoformer.checkpoint.files import read_checkpoint
from ecoformer.checkpoint.load import load_checkpoint
from ecoformer.checkpoint.zoo import ZOO, resolve_source
from ecoformer.errors import InputError
from ecoformer.models.registry import ModelFamily

# timm's own of these names call the children of a model one after another, which ours are not
# made for. These give the same.
_FEATURE_CLASSES = {"list": "getter", "dict": partial(FeatureGraphNet, return_dict=True)}


def register_with_timm(family: ModelFamily) -> None:
    """Make ``timm.create_model`` and ``timm.list_models`` know a family by its timm names."""
    # timm knows a module by the last part of its name, and has a twins of its own; it takes from
    # there what it calls pretrained configurations, and adds names to it.
    module = ModuleType(f"{family.name}.ecoformer_{family.name}")
    sys.modules[module.__name__] = module
    weights = {name: ZOO[name].timm_config() for name in family.timm_names if name in ZOO}
    shared = {"classifier": "head", "first_conv": family.first_conv, "pool_size": (7, 7)}
    configs = {name: {**shared, **weights.get(name, {})} for name in family.timm_names}
    vars(module)["default_cfgs"] = configs
    for timm_name, variant in family.timm_names.items():
        entrypoint = _make_entrypoint(family, timm_name, variant)
        entrypoint.__module__ = module.__name__
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
        config = resolve_pretrained_cfg(timm_name, pretrained_cfg, pretrained_cfg_overlay)

        def build(**keywords: Any) -> nn.Module:
            model = family.create_model(variant, attention, **keywords)
            if pretrained:
                _load_pretrained(model, config, cache_dir)
            return model

        if features_only:
            kwargs |= {"features_only": True, "num_classes": 0}
            feature_cls = kwargs.get("feature_cls", "getter")
            kwargs["feature_cls"] = _FEATURE_CLASSES.get(feature_cls, feature_cls)
        # Weights are loaded while it builds: timm's own loading verifies nothing.
        return build_model_with_cfg(
            build,
            timm_name,
            pretrained=False,
            pretrained_cfg=config.to_dict(),
            feature_cfg={"out_indices": (0, 1, 2, 3)},
            **kwargs,
        )

    entrypoint.__name__ = entrypoint.__qualname__ = timm_name
    entrypoint.__doc__ = (
        f"timm entry point of {variant}; keywords as for create_model. Pretrained weights are "
        "those that the zoo has under this name; another number of classes gets a fresh head."
    )
    return entrypoint


def _load_pretrained(model: nn.Module, config: PretrainedCfg, cache_dir: str | None) -> None:
    """Load what timm's configuration names: a state dict, a file, a URL, or else the zoo's."""
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
