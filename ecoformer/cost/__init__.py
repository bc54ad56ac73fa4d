"""What a model costs: operations, energy, area and memory traffic."""

from __future__ import annotations

from ecoformer.cost.count import Cost, LayerCost, count_cost
from ecoformer.cost.prices import Prices, find_prices

__all__ = ["Cost", "LayerCost", "Prices", "count_cost", "find_prices"]
