"""timm's own models as a family: as they are, or with their softmax attention converted."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ecoformer.errors import InputError, describe_error, is_main_process
from ecoformer.hash_config import HashConfig
from ecoformer.models.registry import ModelFamily

if TYPE_CHECKING:
    from torch import nn

_KINDS = ("msa", "ecoformer")
# Keywords that a flag sets, in case a model does not take them; the side, all can do without.
_RATES = {"drop_path_rate": "--drop-path", "proj_drop_rate": "--drop"}

_logger = logging.getLogger(__name__)


class _Variants(Mapping[str, tuple[str, ...]]):
    """The names that timm lists; asking for one imports timm, which takes seconds."""

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        from timm import list_models

        # Ours stand there too, once they are imported.
        return dict.fromkeys(list_models(exclude_filters="ecoformer_*"), _KINDS)

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self._names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class TimmFamily(ModelFamily):
    """Models of timm: ``msa`` is a model as it is, ``ecoformer`` what ``convert`` makes of it."""

    def describe_names(self) -> str:
        return "those of timm.list_models()"

    def kinds(self, variant: str) -> tuple[str, ...]:
        self._require_name(variant, self.variants)
        return _KINDS

    def create_model(
        self,
        variant: str,
        attention: str | None = None,
        *,
        input_size: int | None = None,
        hashing: HashConfig | None = None,
        **keywords: Any,
    ) -> nn.Module:
        """Build a model with fresh weights, by timm.

        Args:
            input_size: image side, pixels; ``img_size`` of models that are made for one size.
            keywords: timm's; rates of 0 are those of a model that knows none.

        Raises:
            InputError: timm cannot build it so, it does not take images of this size, or it has no
                softmax attention to convert.
        """
        from ecoformer.models.conversion import convert

        attention = attention or _KINDS[0]
        self.check(variant, attention)
        keywords = {k: v for k, v in keywords.items() if k not in _RATES or v}
        model = _build(variant, {**keywords, "img_size": input_size})
        _check_size(variant, model, input_size)
        if attention == "ecoformer":
            report = convert(model, hashing)
            if report.kept and is_main_process():
                reasons = "; ".join(f"{name}: {why}" for name, why in report.kept.items())
                _logger.info("%s keeps attention that has no linear form: %s", variant, reasons)
        return model


def _build(variant: str, keywords: dict[str, Any]) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(variant, **keywords)
        return model
    # Keywords reach any of timm's code.
    except Exception as error:
        # "argument 'x'" is Python's, "argument(s): ['x']" that of a model of timm.
        unknown = re.search(r"unexpected keyword argument\W.*?'(\w+)'", str(error))
        name = unknown.group(1) if unknown else ""
        if name == "img_size" and keywords.get(name):
            return _build(variant, {**keywords, name: None})
        if name in _RATES:
            raise InputError(f"timm's {variant} has no {name}; give {_RATES[name]} 0.") from error
        reason = describe_error(error).rstrip(".")
        raise InputError(f"timm cannot build {variant} ({reason}); change its settings.") from error


def _check_size(variant: str, model: nn.Module, input_size: int | None) -> None:
    """Refuse images that patches do not divide, before a first one meets an assertion."""
    from timm.layers import to_2tuple

    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if not input_size or not patch or getattr(embed, "dynamic_img_pad", False):
        return
    for side in to_2tuple(patch):
        if input_size % side:
            fitting = input_size - input_size % side
            raise InputError(
                f"patches of {variant} have {side} pixels a side, which do not divide "
                f"--input-size {input_size}; give {fitting or side} or {fitting + side}."
            )


FAMILY = TimmFamily(name="timm", variants=_Variants(), default_model="deit_tiny_patch16_224")
