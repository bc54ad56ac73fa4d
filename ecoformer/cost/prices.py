"""What an operation and an access to memory take, by silicon node and precision.

Figures of the literature, each with its source. They are a model: no processor spends exactly this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ecoformer.errors import InputError

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_SOURCES = {
    "45nm": "Horowitz, ISSCC 2014",
    "7nm": "Jouppi et al., ISCA 2021, table 2",
}
# Of a multiplication and of an addition.
_OPERATIONS_PJ = {
    ("45nm", "float32"): (3.7, 0.9),
    ("45nm", "float16"): (1.1, 0.4),
    ("45nm", "int8"): (0.2, 0.03),
    ("7nm", "float32"): (1.31, 0.38),
    ("7nm", "float16"): (0.34, 0.16),
    ("7nm", "bfloat16"): (0.21, 0.11),
    ("7nm", "int8"): (0.07, 0.007),
}
# Of 64 bits, at least and at most; the last one is where tensors lie.
_ACCESS_PJ: dict[str, dict[str, tuple[float, float]]] = {
    "45nm": {
        "8 KB SRAM": (10, 10),
        "32 KB SRAM": (20, 20),
        "1 MB SRAM": (100, 100),
        "DRAM": (1300, 2600),
    },
    "7nm": {
        "8 KB SRAM": (7.5, 7.5),
        "32 KB SRAM": (8.5, 8.5),
        "1 MB SRAM": (14, 14),
        "DDR4": (1300, 1300),
        "HBM2": (250, 450),
    },
}


@dataclass(frozen=True)
class Prices:
    """Energy of arithmetic and of memory in one node and precision.

    Args:
        mul_pj, add_pj: of one operation.
        value_bytes: size of one value.
        access_pj: name of a memory to what 64 bits take, at least and at most.
        memory: the one in which weights and activations lie.
    """

    node: str
    precision: str
    mul_pj: float
    add_pj: float
    value_bytes: int
    access_pj: Mapping[str, tuple[float, float]]
    memory: str
    source: str

    @property
    def is_papers(self) -> bool:
        """Whether these are the prices of the published table."""
        return (self.node, self.precision) == ("45nm", "float32")

    def price_operations(self, mul: int, add: int) -> float:
        """Energy of multiplications and additions, pJ."""
        return self.mul_pj * mul + self.add_pj * add

    def price_traffic(self, num_bytes: float, memory: str | None = None) -> tuple[float, float]:
        """Energy of moving bytes, pJ, at least and at most; from where tensors lie if None."""
        low_pj, high_pj = self.access_pj[memory or self.memory]
        return low_pj * num_bytes / 8, high_pj * num_bytes / 8

    def __str__(self) -> str:
        accesses = (
            f"{memory} {low:g}" + (f" to {high:g}" if high > low else "")
            for memory, (low, high) in self.access_pj.items()
        )
        return (
            f"{self.node} {self.precision}: {self.mul_pj} pJ a multiplication, {self.add_pj} pJ an "
            f"addition; pJ for 64 bits: {', '.join(accesses)} ({self.source})"
        )


def find_prices(node: str = "45nm", precision: str = "float32") -> Prices:
    """Look up what was published; the paper's prices unless told otherwise.

    Raises:
        InputError: no such node or precision, or the literature has no figure for the two.
    """
    if (node, precision) not in _OPERATIONS_PJ:
        known = ", ".join(map(" ".join, _OPERATIONS_PJ))
        raise InputError(
            f"no published energy of {precision} operations at {node}; there is: {known}."
        )
    mul_pj, add_pj = _OPERATIONS_PJ[node, precision]
    accesses = _ACCESS_PJ[node]
    return Prices(
        node,
        precision,
        mul_pj,
        add_pj,
        _BYTES[precision],
        accesses,
        memory=list(accesses)[-1],
        source=_SOURCES[node],
    )


PAPER_PRICES = find_prices()
