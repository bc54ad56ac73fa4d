"""The formats that a model is exported to, each with what writes it."""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ecoformer.errors import InputError
from ecoformer.ops import use_backend

# What PyTorch writes down of the source code: paths of the machine that exported.
_TRACE = "stack_trace"


class Format(ABC):
    """A kind of file.

    Attributes:
        suffix: that its files end in.
        runs_on: what loads them.
    """

    suffix: str
    runs_on: str

    def require(self) -> None:  # noqa: B027 (most need nothing)
        """Raise an InputError where something is missing that writing or checking a file needs."""

    @abstractmethod
    def write(
        self, program: ExportedProgram, file: Path, axes: Mapping[int, str], outputs: Sequence[str]
    ) -> None:
        """Write a program; ``axes`` names those axes of its input that have any length.

        Args:
            outputs: names, where the format has any; a program that gives a dict has them itself.
        """


class Onnx(Format):
    """One ``.onnx`` file of standard operators, weights inside."""

    suffix = ".onnx"
    runs_on = "ONNX Runtime"

    def require(self) -> None:
        libraries = ("onnx", "onnxscript", "onnxruntime")
        missing = [name for name in libraries if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(f"ONNX files need more libraries: pip install {' '.join(missing)}.")

    def write(
        self, program: ExportedProgram, file: Path, axes: Mapping[int, str], outputs: Sequence[str]
    ) -> None:
        exported = torch.onnx.export(
            program,
            input_names=["input"],
            output_names=[*outputs],
            dynamic_shapes=({**axes},) if axes else None,
            verbose=False,
        )
        assert exported is not None
        for node in exported.model.graph:
            node.metadata_props.pop(f"pkg.torch.onnx.{_TRACE}", None)
        exported.save(file)


class Pt2(Format):
    """A program of PyTorch's operators, for ``torch.export.load``."""

    suffix = ".pt2"
    runs_on = "torch.export.load"

    def write(
        self, program: ExportedProgram, file: Path, axes: Mapping[int, str], outputs: Sequence[str]
    ) -> None:
        # They are somebody's images.
        program.example_inputs = None
        torch.export.save(program, file)


class AotInductor(Format):
    """A compiled library for the kind of machine that made it."""

    suffix = ".aoti.pt2"
    runs_on = "torch._inductor.aoti_load_package, or C++"

    def require(self) -> None:
        # Loads slowly.
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise InputError(
                f"{self.suffix} files need a C++ compiler: install g++ or clang++, or name one "
                "in the variable CXX."
            ) from None

    def write(
        self, program: ExportedProgram, file: Path, axes: Mapping[int, str], outputs: Sequence[str]
    ) -> None:
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))


# A name ends in the suffix of the first that fits.
FORMATS: tuple[Format, ...] = (Onnx(), AotInductor(), Pt2())


def find_format(path: Path) -> Format:
    """Tell the format from a file's name; an unknown one is an InputError."""
    for form in FORMATS:
        if path.name.endswith(form.suffix) and path.name != form.suffix:
            return form
    known = ", ".join(f"NAME{form.suffix} for {form.runs_on}" for form in FORMATS)
    raise InputError(f"{path}: no known format; name the file {known}.")


def trace(
    model: torch.nn.Module, example: torch.Tensor, axes: Mapping[int, str]
) -> ExportedProgram:
    """Export a model in eval mode, its hash attention as plain operations.

    Args:
        axes: of the example that may get any length, unless the model fixes it.
    """
    shapes = {axis: torch.export.Dim.AUTO for axis in axes}
    with torch.no_grad(), use_backend("eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (example,), dynamic_shapes=(shapes,))
    for node in program.graph.nodes:
        node.meta.pop(_TRACE, None)
    return program
