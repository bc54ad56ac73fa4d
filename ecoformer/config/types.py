"""The types of fields: which values fit, how they are written, and how words are read as them.

Files give values, command lines words; the same declarations read both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def read_words(words: str | Sequence[str], hint: Any) -> object:
    """Turn words into the value of a field; those that cannot be one stay as they are.

    Args:
        words: one word, or a list where the field takes several.
        hint: type of the field. ``none`` in any case is None where the field may be None.
    """
    choices = list_choices(hint)
    text = words if isinstance(words, str) else " ".join(words)
    # Before None: "none" is a choice of its own where a field lists it.
    if any(text in get_args(choice) for choice in choices):
        return words
    if NoneType in choices and text.lower() == "none":
        return None
    for choice in choices:
        if get_origin(choice) is tuple and not isinstance(words, str):
            return [read_words(word, get_args(choice)[0]) for word in words]
        if choice in (int, float):
            with suppress(ValueError):
                return choice(text)
    return words


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value has the type of a field; lists serve as tuples."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in choices)
    if origin is Literal:
        return value in choices
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        hints = choices[:1] * len(value) if choices[-1] is Ellipsis else choices
        return len(value) == len(hints) and all(map(fits, value, hints))
    if hint in (int, float):
        # bool is an int, and an int serves as a float.
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def spell(hint: Any) -> str:
    """Write a type as the values that a user may give."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, choices))
    if origin in (Union, UnionType):
        return " or ".join(map(spell, choices))
    if origin is tuple:
        return f"a list of {spell(choices[0])}"
    return "None" if hint is NoneType else str(hint.__name__)


def list_choices(hint: Any) -> tuple[Any, ...]:
    """List the types of a union, or the one that it is."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
