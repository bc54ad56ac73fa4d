"""Configuration files: what a user writes, and what a run leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ecoformer.config.released import find_field
from ecoformer.config.schema import Config, check_type, field_types
from ecoformer.config.types import read_words
from ecoformer.errors import InputError, describe_error, suggest

# A run's own config.yaml has 2 kB.
_MAX_YAML_BYTES = 64 * 1024
_MAX_YAML_DEPTH = 3


def read_config(path: str | Path) -> Config:
    """Read settings from a file; what it leaves out is the default.

    Python files are code and are executed: plain assignments (``lr = 5e-5``), with ``_base_`` for
    the files that they build on. YAML, such as a run's ``config.yaml``, is data and runs nothing.
    The released form ``cfg = dict(...)`` and released names (``nbits``) are accepted in both.

    Raises:
        InputError: the file is missing, broken or empty, or names a field that does not exist.
    """
    fields = read_fields(path)
    with blame_file(path):
        return Config.from_flat(fields)


def read_fields(path: str | Path) -> dict[str, object]:
    """Read the fields that a file sets, as ``read_config`` does, and leave the rest open."""
    fields: dict[str, object] = {}
    with blame_file(path):
        assignments = _load(Path(path))
        if not assignments:
            raise InputError("sets no field; write for example lr = 5e-5.")
        for name, value in assignments.items():
            field = find_field(name)
            if field is None:
                continue
            if field in fields:
                raise InputError(f"{field} is set twice, once as {name!r}; keep one.")
            # YAML takes 5e-5 for text.
            is_words = isinstance(value, str) and Path(path).suffix != ".py"
            fields[field] = read_words(value, field_types()[field]) if is_words else value
            check_type(field, fields[field])
    return fields


@contextmanager
def blame_file(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong with a file in a block into one line that names it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"config file {path}: {error}") from None
    except OSError as error:
        raise InputError(
            f"config file {path}: cannot be read, {error.strerror or error}."
        ) from None
    # A Python file may raise anything, SystemExit too.
    except (Exception, SystemExit) as error:
        detail = describe_error(error).rstrip(".")
        raise InputError(f"config file {path}: cannot be read, {detail}.") from None


def to_yaml(config: Config) -> str:
    """Write every field, one a line, for ``read_config`` to read back."""
    import yaml

    text: str = yaml.safe_dump(config.to_flat(), sort_keys=False)
    return text


def _load(path: Path) -> dict[str, Any]:
    """Read the assignments of a file, those of its bases and of its ``cfg`` among them."""
    if not path.exists():
        near = suggest(path.stem, [file.stem for file in path.parent.glob("*.py")])
        raise InputError(f"does not exist{near}")
    if not path.is_file():
        raise InputError("is a folder." if path.is_dir() else "is no regular file.")
    if path.suffix not in _READERS:
        raise InputError("is neither Python (.py) nor YAML (.yaml).")
    values = _READERS[path.suffix](path)
    released = values.pop("cfg", {})
    if not isinstance(released, dict):
        raise InputError("cfg is not a dict; write cfg = dict(...) or plain assignments.")
    if twice := sorted(values.keys() & released.keys()):
        raise InputError(f"{twice[0]} is set twice, once in cfg; keep one.")
    return values | released


def _read_python(path: Path) -> dict[str, Any]:
    """Execute a file and those that it builds on; a base in YAML stays data."""
    # A quarter of a second, which only those who give such a file pay.
    from mmengine.config import Config as MMConfig
    from mmengine.fileio import register_handler
    from mmengine.fileio.handlers import YamlHandler

    # mmengine's own reader of YAML runs what tags name.
    @register_handler(["yaml", "yml"])
    class _DataHandler(YamlHandler):
        def load_from_fileobj(self, file: Any, **_: object) -> dict[str, Any]:
            return _parse_yaml(file.read())

    try:
        return dict(MMConfig.fromfile(path, lazy_import=False).to_dict())
    except SyntaxError as error:
        # mmengine names its own temporary copy.
        raise error.__context__ or error from None


def _read_yaml(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return _parse_yaml(file.read(_MAX_YAML_BYTES + 1))


def _parse_yaml(text: str | bytes) -> dict[str, Any]:
    """Read data within bounds that are checked first: others may have written it."""
    import yaml

    if len(text) > _MAX_YAML_BYTES:
        raise InputError(f"has more than {_MAX_YAML_BYTES // 1024} kB, and a run's has 2 kB.")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InputError("has an anchor (&) or alias (*); write each value out.")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_YAML_DEPTH:
            raise InputError("nests deeper than a list in cfg; write a line a field.")
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        return {}
    if "_base_" in values:
        raise InputError("has _base_, which only Python files may; write the fields out.")
    return {str(name): value for name, value in values.items()}


_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".py": _read_python,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
}
