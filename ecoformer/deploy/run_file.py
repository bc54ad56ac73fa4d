"""Run an exported file where this package cannot be imported: ``run_file.py FILE IN OUT``.

IN is an ``.npz`` of inputs. OUT becomes one of ``output/NAME/OUTPUT`` for each, and
``codes/NAME/CALL``, bool [B, H, K, N], for each call of hash functions, in the order in which they
run. A compiled library does not show codes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

# Modules of the operations that make codes, in what exporters write down.
_HASH = "KernelHash"


def run_onnx(path: str, batches: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Run a file as it is, and again with its codes among the outputs."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    signs = [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Greater" and any(_HASH in prop.value for prop in node.metadata_props)
    ]
    plain = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in signs)
    shown = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for name, batch in batches.items():
        inputs = {plain.get_inputs()[0].name: batch}
        for output, value in zip(plain.get_outputs(), plain.run(None, inputs), strict=True):
            yield f"output/{name}/{output.name}", value
        for number, codes in enumerate(shown.run(signs, inputs) if signs else ()):
            yield f"codes/{name}/{number}", codes


def name_outputs(name: str, outputs: Any) -> Iterator[tuple[str, Any]]:
    """Name what a program gives: one tensor, or some by their names."""
    by_name = outputs if isinstance(outputs, dict) else {"output": outputs}
    for key, value in by_name.items():
        yield f"output/{name}/{key}", value.numpy()


def run_pt2(path: str, batches: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Run a program as it is, and again node by node."""
    import torch

    codes: list[Any] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            is_sign = str(n.target).startswith("aten.gt.")
            if is_sign and _HASH in str(n.meta.get("nn_module_stack")):
                # Later operations write into it.
                codes.append(result.numpy() > 0)
            return result

    module = torch.export.load(path).module()
    with torch.no_grad():
        for name, batch in batches.items():
            images = torch.from_numpy(batch)
            yield from name_outputs(name, module(images))
            codes.clear()
            Watch(module).run(images)
            for number, bits in enumerate(codes):
                yield f"codes/{name}/{number}", bits


def run_aoti(path: str, batches: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Run a compiled library."""
    import torch

    module = torch._inductor.aoti_load_package(path)
    for name, batch in batches.items():
        yield from name_outputs(name, module(torch.from_numpy(batch)))


def main() -> None:
    """Run what the command line names."""
    # The folder of this file, whose modules are no libraries.
    sys.path.pop(0)
    sys.modules.update(dict.fromkeys(("ecoformer", "pvt", "twins")))  # type: ignore[arg-type]
    path, inputs, outputs = sys.argv[1:]
    run = run_aoti if path.endswith(".aoti.pt2") else run_pt2 if path.endswith(".pt2") else run_onnx
    with np.load(inputs) as batches:
        np.savez(outputs, **dict(run(path, dict(batches))))


if __name__ == "__main__":
    main()
