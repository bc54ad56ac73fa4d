"""The one door: ``ecoformer COMMAND``, the same as ``python -m ecoformer COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from ecoformer import __version__
from ecoformer.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED, print_error, suggest
from ecoformer.threads import limit_spinning

# What each is for, and the function that runs it.
COMMANDS = {
    "train": ("train a model, or time it", "engine.command:run_command"),
    "eval": ("measure the accuracy of weights", "engine.command:run_command"),
    "cost": ("count operations, energy and area of a model", "tools.energy.command:run_get_energy"),
    "convert": ("write weights in another format or layout", "tools.convert:main"),
    "export": ("write a model for ONNX Runtime, PyTorch or AOTInductor", "tools.export:main"),
    "tables": ("make the paper's tables, and our own", "tools.tables.command:main"),
    "plots": ("draw runs, tables, codes, the method", "tools.plots.command:main"),
    "report": ("write runs as one offline page", "tools.report.command:main"),
    "benchmark": ("time EcoFormer beside its peers", "tools.benchmark.command:main"),
    "doctor": ("check machine, data and one training step", "tools.doctor.command:main"),
    "demo": ("the whole story on handwritten digits", "tools.demo:main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit code."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: ecoformer COMMAND ...\n")
        print(*(f"  {command:<11}{what}" for command, (what, _) in COMMANDS.items()), sep="\n")
        print("\necoformer COMMAND --help tells of its flags.")
        return EXIT_DONE
    if name == "--version":
        print(f"ecoformer {__version__}")
        return EXIT_DONE
    if name not in COMMANDS:
        print_error(
            f"unknown command {name!r}{suggest(name, COMMANDS)} ecoformer --help tells all."
        )
        return EXIT_BAD_INPUT
    if name == "eval":
        words = ["--eval", *words]
    limit_spinning()
    try:
        # Each imports what it needs when its words are understood: help is there at once.
        module, _, function = COMMANDS[name][1].partition(":")
        code: int = getattr(import_module(f"ecoformer.{module}"), function)(words)
    except KeyboardInterrupt:
        print_error("interrupted.")
        return EXIT_INTERRUPTED
    return code


if __name__ == "__main__":
    raise SystemExit(main())
