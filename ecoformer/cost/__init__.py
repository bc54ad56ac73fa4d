"""What a model costs: operations, energy and area by the paper's model."""

from __future__ import annotations

from ecoformer.cost.count import Cost, LayerCost, count_cost

__all__ = ["Cost", "LayerCost", "count_cost"]
