"""Our models in timm's registry, with the weights of the zoo."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
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
from torch import Tensor, nn

from ecoformer.checkpoint.files import read_checkpoint
from ecoformer.checkpoint.layout import to_ours
from ecoformer.checkpoint.load import load_checkpoint
from ecoformer.checkpoint.zoo import ZOO, resolve_source
from ecoformer.errors import InputError
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import ModelFamily

# timm's own of these names call the children of a model one after another, which ours are not
# made for. These give the same.
_FEATURE_CLASSES = {"list": "getter", "dict": partial(FeatureGraphNet, return_dict=True)}

# As timm's save_for_hf calls them.
_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")

_logger = logging.getLogger(__name__)


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
        hashing: HashConfig | Mapping[str, Any] | str | None = None,
        features_only: bool = False,
        **kwargs: Any,
    ) -> nn.Module:
        config = resolve_pretrained_cfg(timm_name, pretrained_cfg, pretrained_cfg_overlay)

        def build(**keywords: Any) -> nn.Module:
            model = family.create_model(
                variant, attention, hashing=_read_hashing(hashing), **keywords
            )
            if hashing == "random":
                _logger.warning("%s: hash functions are random, good for timing alone", timm_name)
                model = with_random_hash_functions(model)
            # Of what timm's checkpoint_path reads.
            model.register_load_state_dict_pre_hook(_translate)
            if pretrained:
                _load_pretrained(model, config, f"{family.first_conv}.weight", cache_dir)
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
        f"timm entry point of {variant}; keywords as for create_model, and hashing as a dict, or "
        "'random' for timing. Pretrained weights are those that the zoo has under this name; "
        "another number of classes gets a fresh head."
    )
    return entrypoint


def _read_hashing(hashing: HashConfig | Mapping[str, Any] | str | None) -> HashConfig | None:
    """Settings as Python, JSON or a command line give them; the published ones for "random"."""
    if hashing is None or hashing == "random" or isinstance(hashing, HashConfig):
        return hashing if isinstance(hashing, HashConfig) else None
    try:
        if isinstance(hashing, Mapping):
            return HashConfig(**hashing)
        reason = f"not {hashing!r}"
    except TypeError as error:
        reason = str(error)
    raise InputError(
        f"hashing is an ecoformer.HashConfig, its fields in a dict, or 'random': {reason}."
    )


def _translate(
    module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object, **__: object
) -> None:
    """Bring a released state dict into our layout before a model takes it."""
    translated = to_ours(state)
    if translated.keys() != state.keys():
        state.clear()
        state.update(translated)


def _load_pretrained(
    model: nn.Module, config: PretrainedCfg, stem: str, cache_dir: str | None
) -> None:
    """Load what timm's configuration names: a state dict, file, folder, hub or URL, or the zoo's.

    ``stem`` is the weight that meets the image.
    """
    origin, state = "the state dict", config.state_dict
    if state is None:
        if config.file and Path(config.file).is_dir():
            origin = str(_find_weights(Path(config.file)))
        elif config.hf_hub_id and not config.file:
            origin = _download_weights(config.hf_hub_id, config.hf_hub_filename, cache_dir)
        else:
            # The architecture's name has no weights then, which is what the zoo says of it.
            origin = str(config.file or config.url or config.architecture)
        state = read_checkpoint(resolve_source(origin, cache_dir))["model"]
    # As timm does: colours are summed up for grey images, and repeated for more channels.
    theirs, in_chans = state.get(stem), model.state_dict()[stem].shape[1]
    if theirs is not None and theirs.ndim == 4 and theirs.shape[1] != in_chans:
        # timm's older ones take three colours and no third argument.
        base_chans = () if theirs.shape[1] == 3 else (theirs.shape[1],)
        state = {**state, stem: adapt_input_conv(in_chans, theirs, *base_chans)}
    for note in load_checkpoint(model, state, origin=origin).notes:
        _logger.warning("%s: %s.", origin, note)


def _find_weights(folder: Path) -> Path:
    """The weight file of a folder that timm's ``save_for_hf`` wrote."""
    for name in _WEIGHT_NAMES:
        if (folder / name).exists():
            return folder / name
    raise InputError(
        f"{folder}: no weights there; expected {' or '.join(_WEIGHT_NAMES)}, as timm's save_for_hf "
        "writes them."
    )


def _download_weights(model_id: str, filename: str | None, cache_dir: str | None) -> str:
    """Fetch a model's weight file from the Hugging Face hub into its cache."""
    from huggingface_hub.errors import EntryNotFoundError
    from timm.models._hub import download_from_hf

    try:
        for name in (filename,) if filename else _WEIGHT_NAMES:
            with suppress(EntryNotFoundError):
                path: str = download_from_hf(model_id, name, cache_dir)
                return path
        reason = f"it has no {filename or ' or '.join(_WEIGHT_NAMES)}, or there is no network"
    # Of addresses, permissions, networks and disks, by several libraries.
    except Exception as error:
        reason = str(error).partition("\n")[0]
    raise InputError(
        f"{model_id}: weights of the Hugging Face hub cannot be had ({reason}); download them "
        "elsewhere and pass pretrained_cfg_overlay={'file': FILE}."
    )
