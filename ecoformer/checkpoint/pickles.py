"""What a pickle of PyTorch would build, found out on stand-ins and under limits.

PyTorch's safe reader runs no code, but it builds what it is told to: storages that no file backs,
views that show one value a billion times, nestings that unfold without end. So its instructions
are followed here first, with nothing imported or called and no memory beyond the pickle's own.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Iterable
from typing import IO, Any, NamedTuple

from ecoformer.errors import InputError

# Ten times what a training file of the largest variant needs.
MAX_PICKLE_BYTES = 16 * 2**20
MAX_WORK = 1_000_000
# Containers and values, counted each time that they can be reached.
MAX_UNFOLDED = 1_000_000
MAX_DEPTH = 64
# Bytes of all tensors by bytes of all storages: tied weights are views of one storage.
MAX_SHARING = 8

_ITEM_BYTES = {
    **{"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2},
    **{"Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1},
}
_STORAGE = re.compile(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage")
_DTYPE = re.compile(r"torch\.(?:b?float\d+|u?int\d+|bool|half|double|long)")

_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_TYPED = "torch._tensor._rebuild_from_type_v2"
_COUNTED = ("collections.Counter", "builtins.set", "__builtin__.set")
# Beside tensors and plain values, released files hold the arguments of a run.
ARGUMENTS = ("argparse.Namespace", "mmcv.utils.config.ConfigDict", "addict.addict.Dict")
_ALLOWED = {
    *(*_TENSORS, *_PARAMETERS, _TYPED, *_COUNTED, *ARGUMENTS),
    *("collections.OrderedDict", "torch.Size", "torch.device", "_codecs.encode"),
    *("torch.nn.parameter.Parameter", "torch.Tensor"),
}
_UNUSUAL = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_tensor_v3": "a tensor of an unusual type, such as float8 or uint16",
    "_rebuild_wrapper_subclass": "a tensor of a subclass",
    "_rebuild_device_tensor_from_numpy": "a tensor of an unusual device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of an unusual device",
}
_CONSTANTS = {
    *("BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINUNICODE8", "SHORT_BINSTRING"),
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT", "FLOAT"),
    *("SHORT_BINBYTES", "BINBYTES"),
}
_LITERALS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Storage(NamedTuple):
    """Where a pickle says that the values of tensors lie."""

    key: str
    num_values: int
    item_bytes: int

    @property
    def num_bytes(self) -> int:
        """Size of all values."""
        return self.num_values * self.item_bytes


class _Global(str):
    """The dotted name of something to import."""


class _Object(list[Any]):
    """Stands for an object that may be given attributes; holds what was put into it."""


class _Tensor(tuple[Any, ...]):
    """Stands for a tensor; holds the arguments that make it."""

    num_bytes = 0


class PickleScan:
    """Follow the pickles of one file; the limits hold for all of them together.

    ``storages``, by key, are those that tensors were found to lie in.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._work = 0
        self._tensor_bytes = 0

    def run(self, file: IO[bytes]) -> Any:
        """Follow one pickle from where a file stands to behind its end.

        Returns:
            Numbers and texts as they are. Lists, dictionaries (keys and values in turn) and
            objects are lists of what they hold.

        Raises:
            InputError: it asks for code, goes beyond a limit, or holds what no weights are; the
                file is not named yet.
            Exception: of many types, where it is damaged.
        """
        stack: list[Any] = []
        marked: list[list[Any]] = []
        memo: dict[int, Any] = {}
        value: Any
        for opcode, value, _ in pickletools.genops(file):
            self._charge(1)
            name = opcode.name
            if name in _CONSTANTS:
                stack.append(value)
                continue
            match name:
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[value] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[value])
                case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                    stack.append(_LITERALS[name])
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
                case "MARK":
                    marked.append(stack)
                    stack = []
                case "TUPLE":
                    stack, items = marked.pop(), stack
                    stack.append(tuple(items))
                case "EMPTY_LIST" | "EMPTY_DICT":
                    stack.append([])
                case "APPENDS" | "SETITEMS":
                    stack, items = marked.pop(), stack
                    _put(stack[-1], items, has_keys=name == "SETITEMS")
                case "APPEND":
                    item = stack.pop()
                    _put(stack[-1], [item], has_keys=False)
                case "SETITEM":
                    item, key = stack.pop(), stack.pop()
                    _put(stack[-1], [key, item], has_keys=True)
                case "GLOBAL" | "INST":
                    stack.append(_find_global(value.replace(" ", ".", 1)))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(_find_global(f"{module}.{attribute}"))
                case "BINPERSID":
                    stack.append(self._find_storage(stack.pop()))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(self._call(stack.pop(), arguments))
                case "NEWOBJ":
                    arguments = stack.pop()
                    stack.append(_make_object(stack.pop(), arguments))
                case "BUILD":
                    state = stack.pop()
                    if not isinstance(stack[-1], _Object):
                        raise ValueError("attributes for what has none")
                    # Attributes are copied: addict's dictionaries give themselves for a state.
                    self._charge(len(state or ()))
                    stack[-1].append(tuple(state or ()))
                case "STOP":
                    root = stack.pop()
                    self._tensor_bytes += _measure(root)
                    return root
                case "PROTO" | "FRAME":
                    pass
                case _:
                    raise ValueError(f"an instruction {name} that no weight file has")
        raise EOFError("no end")

    def check_sharing(self) -> None:
        """Compare all tensors with all storages, once the last pickle was followed.

        Raises:
            InputError: the tensors are larger than sharing can explain.
        """
        available = sum(storage.num_bytes for storage in self.storages.values())
        if self._tensor_bytes > MAX_SHARING * available:
            raise _beyond(f"tensors of {self._tensor_bytes} bytes in {available} bytes of data")

    def _charge(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            raise _beyond(f"more than {MAX_WORK} instructions")

    def _find_storage(self, reference: Any) -> Storage:
        match reference:
            case ("storage" | b"storage", _Global() as kind, str() as key, _, int() as num, *_):
                match = _STORAGE.fullmatch(kind)
            case _:
                raise ValueError("a reference to what is no storage")
        item_bytes = _ITEM_BYTES.get(match[1]) if match else None
        if item_bytes is None:
            raise _unusual(f"values of the unusual type {kind}")
        storage = Storage(key, num, item_bytes)
        if num < 0 or self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key!r} of two sizes or none")
        return storage

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of what cannot be called")
        if function in _TENSORS:
            tensor = _Tensor(arguments)
            tensor.num_bytes = _check_view(*arguments[:4])
            return tensor
        if function in _PARAMETERS and isinstance(arguments[0], _Tensor):
            return _Tensor(arguments)
        if function == _TYPED:
            inner, _, inner_arguments, state = arguments
            return _Tensor((self._call(inner, inner_arguments), state))
        if function == "collections.OrderedDict" and not arguments:
            return _Object()
        if function in _COUNTED:
            (items,) = arguments
            self._charge(len(items))
            _check_keys(items[::2] if function == "collections.Counter" else items)
            return _Object(items)
        if function == "torch.Size":
            (items,) = arguments
            self._charge(len(items))
            return tuple(items)
        if function == "torch.device":
            return arguments
        if function == "_codecs.encode":
            self._charge(len(arguments[0]))
            return b""
        raise ValueError(f"a call of {function} that no weight file has")


def _beyond(found: str) -> InputError:
    return InputError(
        f"has {found}, more than a weight file has; get it from a source that you trust."
    )


def _unusual(found: str) -> InputError:
    return InputError(f"holds {found}; save it dense, as float32 or another usual type.")


def _find_global(name: str) -> _Global:
    if name in _ALLOWED or _STORAGE.fullmatch(name) or _DTYPE.fullmatch(name):
        return _Global(name)
    what = _UNUSUAL.get(name.removeprefix("torch._utils."))
    if what:
        raise _unusual(what)
    raise InputError(
        f"asks for {name.removeprefix('__builtin__.')!r} to be run, which is refused; "
        "get a plain state dict or safetensors file from a source that you trust."
    )


def _make_object(kind: Any, arguments: tuple[Any, ...]) -> _Object | _Tensor:
    if kind == "torch.nn.parameter.Parameter" and isinstance(arguments[0], _Tensor):
        return _Tensor(arguments)
    if kind not in ARGUMENTS:
        raise ValueError(f"an object of {kind} that no weight file has")
    return _Object(arguments)


def _put(container: Any, items: list[Any], *, has_keys: bool) -> None:
    if not isinstance(container, list):
        raise ValueError("items for what is no container")
    if has_keys:
        _check_keys(items[::2])
    container += items


def _check_keys(keys: Iterable[Any]) -> None:
    # The hash of nested tuples, or of long numbers chosen to collide, may take for ever.
    for key in keys:
        is_number = isinstance(key, int) and -(2**63) <= key < 2**63
        if not (is_number or key is None or isinstance(key, str | bytes)):
            raise _beyond(f"a dictionary with a {type(key).__name__} for a key")


def _check_view(storage: Any, offset: Any, sizes: Any, strides: Any) -> int:
    """Refuse a tensor that is larger than its storage, or reaches beyond; return its bytes."""
    numbers = (offset, *sizes, *strides)
    if not isinstance(storage, Storage) or len(sizes) != len(strides) or len(sizes) > 64:
        raise ValueError("a tensor without a storage or a shape")
    if not all(isinstance(number, int) and 0 <= number < 2**48 for number in numbers):
        raise ValueError("a tensor whose shape is no shape")
    num_values = math.prod(sizes)
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
    end = offset + (reach if num_values else 0)
    if max(end, num_values) > storage.num_values:
        raise _beyond(f"a tensor of shape {list(sizes)} over {storage.num_values} values")
    return num_values * storage.item_bytes


def _measure(root: Any) -> int:
    """Count the bytes of all tensors as often as they can be reached.

    Refuses what holds itself, is too deep, or is small only because parts of it are shared.
    """
    # By id: values, depth, and bytes of tensors.
    measured: dict[int, tuple[int, int, int]] = {}
    path: set[int] = set()
    todo: list[Any] = [(root,)]
    node = todo[0]
    while todo:
        node = todo[-1]
        if id(node) in measured:
            todo.pop()
            continue
        inner = [item for item in node if isinstance(item, list | tuple)]
        if id(node) not in path:
            path.add(id(node))
            waiting = [item for item in inner if id(item) not in measured]
            if any(id(item) in path for item in waiting):
                raise _beyond("a container that holds itself")
            todo += waiting
            continue
        todo.pop()
        path.discard(id(node))
        sizes, depths, num_bytes = zip(
            (len(node), 0, 0), *(measured[id(item)] for item in inner), strict=True
        )
        size, depth = sum(sizes), max(depths) + 1
        if size > MAX_UNFOLDED:
            raise _beyond(f"containers that unfold to {size} values")
        if depth > MAX_DEPTH:
            raise _beyond(f"containers nested {depth} deep")
        measured[id(node)] = size, depth, sum(num_bytes) + getattr(node, "num_bytes", 0)
    return measured[id(node)][2]
