"""The command line, and the one place where settings are merged."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

from ecoformer.config.file import read_config
from ecoformer.config.released import find_field
from ecoformer.config.schema import Config, field_types
from ecoformer.errors import InputError, is_main_process
from ecoformer.models.registry import ModelFamily


def parse_config(family: ModelFamily, argv: Sequence[str] | None = None) -> Config:
    """Merge the defaults, the family's recipe, the file of ``--config`` and the command line.

    Each beats those before it.

    Args:
        family: the backbone that is run.
        argv: the words after the program's name; ``sys.argv`` if not given.

    Returns:
        All settings; the model's name and attention kind as ``create_model`` takes them, and the
        output folder always named.

    Raises:
        InputError: a flag, field, file or value that cannot be used.
        SystemExit: after ``--help``, with 0.
    """
    flags = _read_flags(sys.argv[1:] if argv is None else argv)
    given = dict(flags)
    config = Config.from_flat({"model": family.default_model, **family.recipe})
    if path := given.get("config"):
        config = read_config(path[-1], config)
    # Costs a tenth of a second, and only programs pay it.
    import tyro

    program = f"python -m {family.name}.main"
    try:
        with redirect_stderr(io.StringIO()) as box, _quiet_unless_main():
            config = tyro.cli(
                Config,
                prog=program,
                description=f"Train, evaluate or time a {family.name} model.",
                args=[word for name, values in flags for word in (f"--{name}", *values)],
                default=config,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _unbox(box.getvalue()).rstrip(".")
        raise InputError(f"{message}. {program} --help tells of all flags.") from None
    if "model" in given and "attn_type" not in given and config.model.model not in family.variants:
        # A released name that spells its attention out beats the file's attn_type.
        config = replace(config, model=replace(config.model, attn_type=None))
    return _complete(config, family)


def _quiet_unless_main() -> AbstractContextManager[object]:
    """The help of one rank is enough."""
    return nullcontext() if is_main_process() else redirect_stdout(io.StringIO())


def _unbox(text: str) -> str:
    """The message in tyro's box: it stands below the first rule; then come help and hints."""
    sections = re.split(r"^.*(?:──|---).*$", text, flags=re.MULTILINE)
    return " ".join((sections[1] if len(sections) > 1 else text).replace("│", " ").split())


def _read_flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Split a command line into fields and their values, in the few forms that tyro knows.

    Released spellings and ``-`` become field names, ``--flag=value`` two words, ``--throughput``
    and ``--train-mode`` without a value get one, ``none`` in any case is None, and a flag with an
    empty value counts as not given. Types are left to tyro.
    """
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") or word == "-h":
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise InputError(f"unexpected {word!r}; every setting is a --flag, see --help.")
    return [pair for group in groups if (pair := _read_flag(*group))]


def _read_flag(flag: str, values: list[str]) -> tuple[str, list[str]] | None:
    if flag in ("-h", "--help"):
        return "help", values
    name = flag[2:].replace("-", "_")
    if name.startswith("no_") and field_types().get(name[3:]) is bool:
        return name, values
    if name in ("train_mode", "no_train_mode") and not values:
        return "train_mode", [str(name == "train_mode")]
    if name == "throughput" and not values:
        return name, ["median"]
    field = find_field(flag)
    if field is None or values == [""]:
        return None
    # The one flag whose "none" is a choice: None leaves it to the device.
    if field == "amp_dtype":
        return field, values
    return field, ["None" if value.lower() == "none" else value for value in values]


def _complete(config: Config, family: ModelFamily) -> Config:
    """Fill in what follows from other settings."""
    model, run = config.model, config.run
    variant, attention = family.resolve(model.model, model.attn_type)
    if model.train_msa and attention not in ("msa", "lsa_msa"):
        if model.attn_type or model.model.endswith("_ecoformer"):
            whose = "the default model " if model.model == family.default_model else ""
            raise InputError(
                "--train_msa fine-tunes original weights into softmax attention, and "
                f"{whose}{model.model} is to have {attention!r}; name a softmax model with "
                "--model, or drop --train_msa."
            )
        variant, attention = family.resolve(variant, "msa")
    if run.config:
        name = Path(run.config).stem
    elif attention == family.resolve(model.model)[1]:
        name = model.model
    else:
        # Two stages of one model must not share a folder.
        name = f"{variant}_{attention}"
    return replace(
        config,
        model=replace(model, model=variant, attn_type=attention),
        run=replace(run, output_dir=run.output_dir or f"runs/{name}"),
    )
