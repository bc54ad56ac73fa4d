"""Describe what a model costs, for people and for programs."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from functools import partial

from ecoformer.attention import attention_class, attention_kinds
from ecoformer.config import Config
from ecoformer.cost import Cost, Prices, count_cost
from ecoformer.cost.count import ADD_AREA_UM2, MUL_AREA_UM2
from ecoformer.models.registry import ModelFamily
from ecoformer.tasks import find_task
from ecoformer.tasks.dense import DensePrediction
from ecoformer.tools.table import Column, Row, format_markdown

_COLUMNS = (
    Column("kind", "layers"),
    Column("mul", "mul M", ",.2f", 1e6),
    Column("add", "add M", ",.2f", 1e6),
    Column("energy_pj", "energy uJ", ",.2f", 1e6),
    Column("share", "share %"),
)
_SCOPE = (
    "Counted are the multiplications and additions of one image. GELU, ReLU, softmax, pooling and "
    "residual sums count nothing. Energy is a model by published figures, {prices}."
)
_DENSE = "Group normalisation, resizing of maps and the choice of boxes count nothing either."
_AREA = f"Area is that of a unit an operation, {MUL_AREA_UM2:,} and {ADD_AREA_UM2:,} um^2."
_TRAFFIC = (
    "Traffic is of an image alone, beside that energy: each layer reads weights and inputs once "
    "and writes its outputs, all of it in {memory}. Softmax keeps its N x N maps on the chip, as "
    "flash attention does; without that they are written and read, too."
)


def count(config: Config, family: ModelFamily) -> Cost:
    """Count the cost of the model of a run, the heads of its task with it.

    Raises:
        InputError: the family has no such model, or it takes no images of that size.
    """
    settings, task = config.model, find_task(config.run.task)
    create = partial(
        family.create_empty,
        settings.model,
        settings.attn_type,
        input_size=settings.input_size,
        hashing=config.hashing,
        **settings.keywords,
    )
    model = task(config).create_model(create) if issubclass(task, DensePrediction) else create()
    return count_cost(model, find_image_size(config))


def find_image_size(config: Config) -> tuple[int, int]:
    """Height and width of an image of a run, of those it is timed with where sizes differ."""
    task = find_task(config.run.task)
    if issubclass(task, DensePrediction):
        return task(config).input_sides
    return config.model.input_size, config.model.input_size


def _is_dense(config: Config) -> bool:
    return issubclass(find_task(config.run.task), DensePrediction)


def to_text(config: Config, cost: Cost, prices: Prices) -> str:
    """Write a table of the kinds of layers, and the totals."""
    total_pj = prices.price_operations(cost.mul, cost.add)
    rows: list[Row] = []
    for kind, (mul, add) in [*cost.by_kind().items(), ("total", (cost.mul, cost.add))]:
        energy_pj = prices.price_operations(mul, add)
        share = 100 * energy_pj / total_pj
        rows.append({"kind": kind, "mul": mul, "add": add, "energy_pj": energy_pj, "share": share})
    model = config.model
    height, width = cost.input_size
    area = [f"area             {cost.area_um2 / 1e12:.2f} m^2"] if prices.is_papers else []
    task = f"{config.run.task} by " if _is_dense(config) else ""
    return "\n".join(
        [
            f"{task}{model.model}, {model.attn_type} attention, one image of {height} x {width} "
            "pixels",
            "",
            format_markdown(_COLUMNS, rows),
            "",
            f"multiplications  {cost.mul / 1e9:.2f} G",
            f"additions        {cost.add / 1e9:.2f} G",
            f"energy           {total_pj / 1e9:.2f} G pJ = {total_pj / 1e9:.2f} mJ",
            *area,
            f"parameters       {cost.num_parameters / 1e6:.2f} M",
            f"traffic          {_describe_traffic(cost, prices, with_maps=False)}",
            f"with N x N maps  {_describe_traffic(cost, prices, with_maps=True)}",
            "",
            *(textwrap.fill(note, 100) for note in _list_notes(config, cost, prices)),
        ]
    )


def _describe_traffic(cost: Cost, prices: Prices, *, with_maps: bool) -> str:
    num_bytes = cost.traffic_bytes(prices.value_bytes, with_maps=with_maps)
    low_pj, high_pj = prices.price_traffic(num_bytes)
    return (
        f"{num_bytes / 1e6:.1f} MB = {low_pj / 1e9:.2f} to {high_pj / 1e9:.2f} mJ from "
        f"{prices.memory}"
    )


def to_json(config: Config, cost: Cost, prices: Prices) -> str:
    """Write everything: totals, kinds of layers, and each layer."""
    model = config.model
    content = {
        "task": config.run.task,
        "model": model.model,
        "attention": model.attn_type,
        "hashing": asdict(config.hashing) if model.attn_type == "ecoformer" else None,
        "input_size": cost.input_size,
        "node": prices.node,
        "precision": prices.precision,
        "mul": cost.mul,
        "add": cost.add,
        "energy_pj": prices.price_operations(cost.mul, cost.add),
        "area_um2": cost.area_um2 if prices.is_papers else None,
        "parameters": cost.num_parameters,
        "traffic": {
            name: _list_traffic(cost, prices, with_maps=with_maps)
            for name, with_maps in (("fused", False), ("with_maps", True))
        },
        "kinds": {
            kind: {"mul": mul, "add": add, "energy_pj": prices.price_operations(mul, add)}
            for kind, (mul, add) in cost.by_kind().items()
        },
        "layers": [asdict(layer) for layer in cost.layers],
        "notes": _list_notes(config, cost, prices),
    }
    return json.dumps(content, indent=1)


def _list_traffic(cost: Cost, prices: Prices, *, with_maps: bool) -> dict[str, object]:
    num_bytes = cost.traffic_bytes(prices.value_bytes, with_maps=with_maps)
    energy_pj = {memory: prices.price_traffic(num_bytes, memory) for memory in prices.access_pj}
    return {"bytes": num_bytes, "energy_pj": energy_pj}


def _list_notes(config: Config, cost: Cost, prices: Prices) -> list[str]:
    classes = map(attention_class, attention_kinds())
    notes = [cls.cost_note for cls in classes if f"{cls.kind} attention" in cost.by_kind()]
    area = _AREA if prices.is_papers else ""
    traffic = _TRAFFIC.format(memory=prices.memory)
    dense = _DENSE if _is_dense(config) else ""
    return [*filter(None, [_SCOPE.format(prices=prices), dense, area, traffic, *notes])]
