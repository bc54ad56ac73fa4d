"""The command line of a run: a flag for each field."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from itertools import pairwise
from typing import IO, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ecoformer.config.arguments import ArgumentParser
from ecoformer.config.merge import merge
from ecoformer.config.released import SPELLINGS, WITHOUT_MEANING, find_field
from ecoformer.config.schema import Config, check_type, field_types
from ecoformer.config.types import list_choices, read_words
from ecoformer.errors import InputError, is_main_process
from ecoformer.models.registry import ModelFamily

_DESCRIPTION = """\
Train, evaluate or time a model. Flags beat the file of --config, which beats the defaults. A .py
file is code that is executed; a .yaml file, such as the config.yaml that a run leaves, is data.
"""
# What a flag means that is given without the value that it may have.
_BARE = {"throughput": "median", "train_mode": True}


def parse_config(argv: Sequence[str] | None = None, family: ModelFamily | None = None) -> Config:
    """Merge the defaults, recipes of family and task, the file of ``--config``, and words.

    Each beats those before it.

    Args:
        argv: ``sys.argv`` if not given.
        family: the backbone that is run; the one that ``--model`` belongs to if not given.

    Returns:
        All settings; the model's name and attention kind as ``create_model`` takes them, and the
        output folder always named.

    Raises:
        InputError: a flag, field, file or value that cannot be used.
        SystemExit: after ``--help``, with 0.
    """
    parser = _make_parser(family)
    options, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("--"):
            find_field(word.partition("=")[0])
        raise InputError(f"unexpected {word!r}; every setting is a --flag, see --help.")
    return merge(dict(_read_options(options)), family)


def _read_options(options: argparse.Namespace) -> Iterator[tuple[str, object]]:
    for name, words in vars(options).items():
        if words in ("", [""]) and name != "aa":
            # As from an unset shell variable: no value. A policy that is empty is none.
            continue
        is_text = isinstance(words, (str, list))
        value = read_words(words or "none", field_types()[name]) if is_text else words
        check_type(name, value, _flag(name))
        yield name, value


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. {self.prog} --help tells of all flags.")

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """Print on one rank alone."""
        if is_main_process():
            super().print_help(file)


class _Ignore(argparse.Action):
    def __call__(self, *given: Any) -> None:
        find_field(given[-1])


def _make_parser(family: ModelFamily | None) -> ArgumentParser:
    module = f"python -m {family.name}.main" if family else ""
    parser = _Parser(
        prog=module or "ecoformer train",
        usage=f"{module or 'ecoformer {train,eval}'} [--FLAG VALUE] ...",
        description=_DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    own = {"model": family.default_model, **family.recipe} if family else {}
    defaults = Config.from_flat(own).to_flat()
    aliases: dict[str, list[str]] = {}
    for spelling, field in SPELLINGS.items():
        aliases.setdefault(field, []).append(_flag(spelling))
    for section in fields(Config):
        kind = get_type_hints(Config)[section.name]
        group = parser.add_argument_group(section.name)
        for name, help_text in _read_help(kind).items():
            default = defaults[name]
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            if shown not in (None, ""):
                help_text += f" ({shown})"
            group.add_argument(
                _flag(name),
                *aliases.get(name, []),
                dest=name,
                help=help_text.replace("%", "%%"),
                **_describe_values(name),
            )
    parser.add_argument("--no-train-mode", dest="train_mode", action="store_false")
    for name in WITHOUT_MEANING:
        spellings = {_flag(name), f"--{name}"}
        parser.add_argument(*spellings, nargs="*", action=_Ignore, help=argparse.SUPPRESS)
    return parser


def _describe_values(name: str) -> dict[str, Any]:
    """Choose what argparse is told of the values of a flag."""
    hint = field_types()[name]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    metavar, nargs = "VALUE", None
    for choice in list_choices(hint):
        if get_origin(choice) is tuple:
            choice, nargs = get_args(choice)[0], "+"
        if get_origin(choice) is Literal:
            metavar = f"{{{','.join(get_args(choice))}}}"
        elif choice in (int, float):
            metavar = "NUMBER"
    if name in _BARE:
        return {"metavar": metavar, "nargs": "?", "const": _BARE[name]}
    return {"metavar": metavar, "nargs": nargs}


@cache
def _read_help(section: type) -> dict[str, str]:
    """Read the line under each field of a section."""
    (body,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(line.value.value)
        for field, line in pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
