"""``ecoformer.export``: a model as a file that runs without this package."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ecoformer.deploy.checking import Comparison, check_file, name_outputs
from ecoformer.deploy.formats import find_format, trace
from ecoformer.errors import InputError, describe_error
from ecoformer.files import open_atomic
from ecoformer.hashing import hash_layers

# Of images [B, 3, height, width]: what a dynamic file leaves open.
_AXES = {0: "batch", 2: "height", 3: "width"}
# Lengths above are as good as any.
_MANY = 2**31


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the model.

    Args:
        axes: name of each axis of any length, with its least length.
    """

    path: Path
    runs_on: str
    axes: Mapping[str, int]
    comparisons: list[Comparison]

    def __str__(self) -> str:
        axes = ", ".join(f"{name} from {least}" for name, least in self.axes.items())
        sizes = f"any {axes} that the model takes" if axes else "the sizes of the example alone"
        head = f"{self.path} ({self.path.stat().st_size / 1e6:.1f} MB) for {self.runs_on}: {sizes}"
        return "\n  ".join([head, *map(str, self.comparisons)])


def export(
    model: nn.Module, example: Tensor, path: str | Path, dynamic: bool = True
) -> ExportReport:
    """Write a model, in eval mode, as a file of standard operators, and run it against the model.

    The name decides the format: ``NAME.onnx``; ``NAME.pt2`` for ``torch.export.load``;
    ``NAME.aoti.pt2``, a package that AOTInductor compiled for this kind of machine. The file runs
    in a fresh process that cannot import this package: on the example and, where ``dynamic``, on
    random images of two other sizes and batch sizes. It takes its name when it has passed.

    Args:
        model: float32, on the CPU, fitted; its mode, train or eval, stays. Of one that gives a
            mapping, such as a detector, the file gives the tensors in it, by their names.
        example: [B, channels, height, width], float32. Its values matter to the comparison alone.
        dynamic: batch, height and width may have any length that the model takes. An axis that the
            model itself fixes stays fixed; the report says which do not.

    Returns:
        A report, whose text has a line for each batch that was compared.

    Raises:
        InputError: hash functions are not fitted, the name has another ending, the example is no
            batch of images or too small for all sizes, something must be installed, PyTorch cannot
            export the model, or the disk refuses.
        MismatchError: the file does not compute what the model does.
    """
    path = Path(path)
    form = find_format(path)
    _check_inputs(model, example)
    form.require()
    wanted = _AXES if dynamic else {}
    with _eval_mode(model), tempfile.TemporaryDirectory() as folder:
        outputs = _try_out(model, example)
        # A length of 1 would be taken for fixed.
        traced = torch.cat([example, example]) if dynamic and len(example) == 1 else example
        file = Path(folder) / f"model{form.suffix}"
        try:
            program = trace(_TensorsAlone(model), traced, wanted)
            axes = _free_axes(program, traced)
            form.write(program, file, {axis: _AXES[axis] for axis in axes}, outputs)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"PyTorch cannot export this model to {form.suffix} ({describe_error(error)})."
            ) from error
        comparisons = check_file(model, file, [example, *_other_batches(model, example, axes)])
        with open(file, "rb") as source, open_atomic(path) as target:
            shutil.copyfileobj(source, target)
    least = {_AXES[axis]: length for axis, length in axes.items()}
    return ExportReport(path, form.runs_on, least, comparisons)


def _check_inputs(model: nn.Module, example: Tensor) -> None:
    for name, layer in hash_layers(model).items():
        if not layer.is_fitted:
            raise InputError(
                f"{name}: the hash functions are not fitted; load an EcoFormer checkpoint, or call "
                "ecoformer.fit_hash_functions(model, images) before the export."
            )
    if not (isinstance(example, Tensor) and example.dim() == 4 and len(example)):
        raise InputError("the example is a batch of images, a tensor [B, 3, height, width].")
    devices = {parameter.device.type for parameter in model.parameters()} | {example.device.type}
    if devices != {"cpu"}:
        raise InputError(
            f"export takes model and example on the CPU, not on {', '.join(sorted(devices))}; "
            "call model.cpu() and example.cpu()."
        )
    dtypes = {parameter.dtype for parameter in model.parameters()} | {example.dtype}
    if dtypes != {torch.float32}:
        raise InputError(
            f"export takes a float32 model and example, not {', '.join(map(str, dtypes))}; call "
            "model.float() and example.float()."
        )


class _TensorsAlone(nn.Module):
    """Gives what a model does, but of a mapping the tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        out = self.model(images)
        return out if isinstance(out, Tensor) else name_outputs(out)


@torch.no_grad()
def _try_out(model: nn.Module, example: Tensor) -> list[str]:
    """Run a model; returns the names of its outputs."""
    # What the model does not take it refuses in words of its own, with numbers.
    out = model(example)
    if not (isinstance(out, Tensor) or (isinstance(out, Mapping) and name_outputs(out))):
        raise InputError(
            "export takes a model whose output is one tensor, or some by name in a mapping, not a "
            f"{type(out).__name__}; wrap it."
        )
    return list(name_outputs(out))


def _free_axes(program: ExportedProgram, example: Tensor) -> dict[int, int]:
    """Axes of the input that have any length, with the least one."""
    (name,) = program.graph_signature.user_inputs
    (node,) = (n for n in program.graph.nodes if n.name == name)
    free = {}
    for axis, length in enumerate(node.meta["val"].shape):
        # One that the model fixes may still be a symbol, of a constant.
        if not isinstance(length, torch.SymInt) or length.node.expr.is_number:
            continue
        bounds = program.range_constraints[length.node.expr]
        if not bounds.upper > _MANY:
            raise InputError(
                f"an example of {' x '.join(map(str, example.shape[2:]))} pixels is too small to "
                "export for all sizes; give one of at least 64 x 64."
            )
        # PyTorch counts batches from 2, and takes those of 1.
        free[axis] = 1 if axis == 0 else int(bounds.lower)
    return free


def _other_batches(model: nn.Module, example: Tensor, axes: Mapping[int, int]) -> Iterator[Tensor]:
    """Smaller and larger ones where axes are free, of odd sizes too if the model takes such."""
    generator = torch.Generator().manual_seed(0)
    for batch_size, scale, extra in ((1, 2, 0), (len(example) + 1, 1, 33)) if axes else ():
        shape = list(example.shape)
        for axis, least in axes.items():
            shape[axis] = max(least, shape[axis] // scale + extra)
        if 0 in axes:
            shape[0] = batch_size
        batch = torch.randn(shape, generator=generator)
        if not _takes(model, batch):
            # One that wants whole patches, which the example has.
            for axis in axes.keys() - {0}:
                shape[axis] = 2 * example.shape[axis]
            batch = torch.randn(shape, generator=generator)
        yield batch


@torch.no_grad()
def _takes(model: nn.Module, batch: Tensor) -> bool:
    """Tell whether a model takes images of a size; one that refuses does so in ways of its own."""
    try:
        model(batch)
    except Exception:
        return False
    return True


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
