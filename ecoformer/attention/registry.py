"""The kinds of attention by name: ours, and those that a user's program adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ecoformer.attention.base import MultiHeadAttention
from ecoformer.errors import InputError, suggest

_Kind = TypeVar("_Kind", bound=type[MultiHeadAttention])

_KINDS: dict[str, type[MultiHeadAttention]] = {}


def register_attention(kind: str) -> Callable[[_Kind], _Kind]:
    """Name a class, so that backbones build it, and tables, plots and conversion ask it.

    A name that another class has is an InputError.
    """

    def register(cls: _Kind) -> _Kind:
        known = _KINDS.get(kind)
        # A cell of a notebook that runs again defines the same class anew.
        if known is not None and _identify(known) != _identify(cls):
            raise InputError(
                f"attention kind {kind!r} is {known.__qualname__} already; choose another name."
            )
        cls.kind = kind
        # Not inherited: a kind that builds on another one is a kind of its own.
        cls.label = vars(cls).get("label", kind)
        cls.any_backbone = vars(cls).get("any_backbone", True)
        _KINDS[kind] = cls
        return cls

    return register


def attention_class(kind: str) -> type[MultiHeadAttention]:
    """Look a kind up; an unknown one is an InputError that names the nearest."""
    if kind not in _KINDS:
        names = attention_kinds()
        raise InputError(
            f"unknown attention kind {kind!r}{suggest(kind, names)} There are: {', '.join(names)}."
        )
    return _KINDS[kind]


def attention_kinds() -> tuple[str, ...]:
    """All names, in alphabetical order."""
    return tuple(sorted(_KINDS))


def _identify(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
