"""The table of energy: modelled, executed, and measured where a machine tells it."""

from __future__ import annotations

import pytest
import torch

from ecoformer.cost import joules
from ecoformer.cost.joules import EnergyMeter, EnergyNotMeasurable
from ecoformer.tools.tables.energy import describe_energy

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_available", [True, False])
def test_the_energy_table_names_its_source(
    is_available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(device: torch.device) -> EnergyMeter:
        if not is_available:
            raise EnergyNotMeasurable("nobody knows")
        return EnergyMeter("a test", lambda: [0], [1])

    monkeypatch.setattr("ecoformer.tools.tables.energy.find_meter", find)
    monkeypatch.setattr(joules, "_MIN_SECONDS", 0.001)
    rows, notes = describe_energy("pvt_v2_b2_li", input_size=32, batch_size=2, device=CPU)
    assert [row["name"] for row in rows] == ["sra"]
    assert ("measured_j" in rows[0]) is is_available
    assert ("a test" if is_available else "not available here: nobody knows") in notes[-1]
