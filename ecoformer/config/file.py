"""Configuration files: what a user writes, and what a run leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ecoformer.config.released import find_field
from ecoformer.config.schema import Config
from ecoformer.errors import InputError, suggest


def read_config(path: str | Path, base: Config | None = None) -> Config:
    """Read settings from a file.

    A file is Python, of plain assignments (``lr = 5e-5``), with ``_base_`` for the files that it
    builds on; the released form ``cfg = dict(...)`` and released names (``nbits``) are accepted.
    A run's ``config.yaml`` is one too. Python files are executed: read what you run.

    Args:
        path: the file.
        base: keeps what the file leaves out; the defaults if not given.

    Returns:
        The settings of ``base``, with those of the file in their place.

    Raises:
        InputError: the file is missing, broken or empty, or names a field that does not exist.
    """
    values: dict[str, Any] = {}
    try:
        for name, value in _load(Path(path)).items():
            field = find_field(name)
            if field is None:
                continue
            if field in values:
                raise InputError(f"{field} is set twice, once as {name!r}; keep one.")
            values[field] = value
        return Config.from_flat(values, base)
    except InputError as error:
        raise InputError(f"config file {path}: {error}") from None
    except OSError as error:
        raise InputError(f"config file {path}: cannot be read, {error.strerror}.") from None


def to_yaml(config: Config) -> str:
    """Put every field into YAML that ``read_config`` turns back into the same configuration.

    Args:
        config: of a run.

    Returns:
        A line a field.
    """
    import yaml

    text: str = yaml.safe_dump(config.to_flat(), sort_keys=False)
    return text


def _load(path: Path) -> dict[str, Any]:
    """Read the assignments of a file, those of its ``cfg`` among them."""
    if not path.exists():
        near = suggest(path.stem, [file.stem for file in path.parent.glob("*.py")])
        raise InputError(f"does not exist{near}")
    if path.is_dir():
        raise InputError("is a folder.")
    if path.suffix not in (".py", ".yaml", ".yml"):
        raise InputError("is neither Python (.py) nor YAML (.yaml).")
    # A quarter of a second, which only those who give a file pay.
    from mmengine.config import Config as MMConfig

    try:
        values = dict(MMConfig.fromfile(path, lazy_import=False).to_dict())
    # The file is code, and may raise anything, SystemExit too.
    except (Exception, SystemExit) as error:
        # mmengine wraps a syntax error in one that names its own temporary copy.
        cause = error.__context__ if isinstance(error, SyntaxError) and error.__context__ else error
        detail = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise InputError(f"cannot be read, {detail.rstrip('.')}.") from None
    released = values.pop("cfg", {})
    if not isinstance(released, dict):
        raise InputError("cfg is not a dict; write cfg = dict(...) or plain assignments.")
    if twice := sorted(values.keys() & released.keys()):
        raise InputError(f"{twice[0]} is set twice, once in cfg; keep one.")
    values |= released
    if not values:
        raise InputError("sets no field; write for example lr = 5e-5.")
    return values
