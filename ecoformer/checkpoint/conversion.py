"""Weights of an earlier stage in the attention layers of a later one, by what their classes say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ecoformer.attention import MultiHeadAttention, attention_class, attention_kinds


class Entry(NamedTuple):
    """An entry of a model, with the entries of the file that it comes from.

    ``leftovers`` is what the rules on its way leave out; ``[k]`` marks a part of an entry.
    """

    tensor: Tensor
    sources: tuple[str, ...]
    leftovers: tuple[str, ...] = ()


class Conversion:
    """What a file has for a model; ``state`` is name -> tensor, in our layout."""

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        self._state = state
        # By how the names of a layer's entries begin.
        self._layers = {
            f"{name}." if name else "": layer
            for name, layer in model.named_modules()
            if isinstance(layer, MultiHeadAttention)
        }

    def find(self, name: str, *, may_derive: bool) -> Entry | None:
        """Take an entry by its name, or make it of those of an earlier kind of attention."""
        if name in self._state:
            return Entry(self._state[name], (name,))
        owner = self._find_owner(name)
        if owner is None or not may_derive:
            return None
        return self._derive(owner, name.removeprefix(owner), self._layers[owner])

    def is_own(self, name: str, taken: Collection[str] = ()) -> bool:
        """Whether a layer makes this buffer itself, and ``taken`` has none of its sort for it."""
        owner = self._find_owner(name)
        if owner is None:
            return False
        own = tuple(f"{owner}{buffer}." for buffer in self._layers[owner].own_buffers)
        return f"{name}.".startswith(own) and not any(f"{t}.".startswith(own) for t in taken)

    def is_foreign(self, name: str) -> bool:
        """Whether a buffer is that of kinds alone which the layer's kind is not made of.

        Their projections may have the same names, and mean something else.
        """
        owner = self._find_owner(name)
        if owner is None:
            return False
        part = f"{name.removeprefix(owner)}."
        known = [attention_class(kind) for kind in attention_kinds()]
        owners = [
            kind for kind in known if any(part.startswith(f"{own}.") for own in kind.own_buffers)
        ]
        made_of: list[type[MultiHeadAttention]] = [type(self._layers[owner])]
        while (parent := made_of[-1].parent) is not None:
            made_of.append(attention_class(parent))
        return bool(owners) and not set(owners) & set(made_of)

    def _find_owner(self, name: str) -> str | None:
        owners = (owner for owner in self._layers if name.startswith(owner))
        return max(owners, key=len, default=None)

    def _derive(
        self, owner: str, name: str, kind: MultiHeadAttention | type[MultiHeadAttention]
    ) -> Entry | None:
        """Go back from kind to parent until the file has it: EcoFormer, softmax, original."""
        if owner + name in self._state:
            return Entry(self._state[owner + name], (owner + name,))
        if kind.parent is None:
            return None
        parent = attention_class(kind.parent)
        part, _, leaf = name.rpartition(".")
        # By the name of an entry, or by that of a module.
        rule, ending = kind.derived.get(name), ""
        if rule is None:
            rule, ending = kind.derived.get(part), f".{leaf}"
        if rule is None:
            return self._derive(owner, name, parent)
        found = {
            source: entry
            for source in rule.sources
            if (entry := self._derive(owner, f"{source}{ending}", parent))
        }
        if len(found) < len(rule.sources):
            return None
        try:
            tensor = rule.make(*(entry.tensor for entry in found.values()))
        except (RuntimeError, IndexError):
            # Shapes of a broken file that do not join: what needs them counts as missing.
            return None
        leftovers = []
        for left_out in rule.leaves_out:
            source, bracket, rest = left_out.partition("[")
            if bracket:
                leftovers.append(f"{found[source].sources[-1]}[{rest}")
            elif (module := f"{owner}{left_out}{ending}") in self._state:
                leftovers.append(module)
        for entry in found.values():
            leftovers += entry.leftovers
        sources = [source for entry in found.values() for source in entry.sources]
        return Entry(tensor, tuple(sources), tuple(leftovers))
