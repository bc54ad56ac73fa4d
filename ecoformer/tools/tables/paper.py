"""Index every table and figure of the paper and of the released README, row by row.

Each row sets what was published beside ours and says in one word how ours came about. What was
published and is known here is in the released README, in the paper's abstract, or in the literature
that a row names. The rest is left empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ecoformer.checkpoint.zoo import ZOO, ZooEntry
from ecoformer.cost.count import ADD_AREA_UM2, MUL_AREA_UM2
from ecoformer.cost.prices import PAPER_PRICES
from ecoformer.models.registry import find_family
from ecoformer.tools.table import Column, Row, Value
from ecoformer.tools.tables.ablations import list_arms
from ecoformer.tools.tables.costs import describe_cost
from ecoformer.tools.tables.published import describe_models
from ecoformer.tools.tables.sequences import PUBLISHED

WORDS = ("recomputed", "measured", "stand-in", "not run")
PAPER_COLUMNS = (
    Column("table", "table or figure"),
    Column("row", "row"),
    Column("quantity", "quantity"),
    Column("published", "published", "g"),
    Column("source", "source"),
    Column("ours", "ours"),
    Column("word", "how"),
    Column("command", "command"),
    Column("note", "which, why, or what it takes"),
)
PAPER_NOTES = (
    "recomputed: a count, exact on any machine. measured: under what was published. stand-in: "
    "measured on other data or hardware, which the last column names. not run: the last column "
    "says what it takes.",
    "Tables and figures go by subject. Published values are those of the released README, of the "
    "paper's abstract and of the literature named; what the paper's other tables say was not at "
    "hand, and its cells are empty.",
)

_README = "released README"
_ABSTRACT = "abstract, arXiv 2209.09004"
_HARNESS = "Skyformer's harness, arXiv 2111.00035"
# What describe_cost gives: key, quantity, unit, digits, the field of the released README.
_COSTS = (
    ("mul", "#Mul, G", 1e9, 2, "mul_g"),
    ("add", "#Add, G", 1e9, 2, "add_g"),
    ("energy_pj", "energy, mJ", 1e9, 2, "energy_g_pj"),
    ("area_um2", "area, m^2", 1e12, 2, None),
)
_KINDS_COMMAND = (
    "ecoformer tables kinds --data-set FMNIST --data-path FASHION --epochs 1 1 --batch-size 64 "
    "--seeds 0 1 2"
)
_IMAGENET = "needs the validation images of ImageNet-1k and the weights"
_LONG_KINDS = {"softmax": "msa", "Performer": "performer", "EcoFormer": "ecoformer"}


@dataclass(frozen=True)
class Results:
    """Tables that ``ecoformer tables`` has left in a folder, as JSON."""

    folder: Path

    def find(self, table: str, **cells: Value) -> tuple[Row, Mapping[str, str], str] | None:
        """Find a row by its cells, with its table's environment and first note."""
        try:
            content = json.loads((self.folder / f"{table}.json").read_text("utf-8"))
            rows = [r for r in content["rows"] if all(r.get(k) == v for k, v in cells.items())]
            return (rows[0], content["environment"], content["notes"][0]) if rows else None
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None


def describe_paper(results: Results) -> list[dict[str, Value]]:
    """List all rows for ``PAPER_COLUMNS``; costs are counted now, the rest is looked up."""
    return [
        *_list_operations(),
        *_list_models(results),
        *_list_kinds(results),
        *_list_settings(results),
        *_list_long_sequences(),
        *_list_figures(),
    ]


def _list_operations() -> Iterator[dict[str, Value]]:
    source = f"{PAPER_PRICES.source}, as in the paper"
    for name, energy_pj, area_um2 in (
        ("multiplication", PAPER_PRICES.mul_pj, MUL_AREA_UM2),
        ("addition", PAPER_PRICES.add_pj, ADD_AREA_UM2),
    ):
        for quantity, value in (("energy, pJ", energy_pj), ("area, um^2", area_um2)):
            yield {
                "table": "energy and area of an operation",
                "row": f"float32 {name}, 45 nm",
                "quantity": quantity,
                "published": value,
                "source": source,
                "ours": f"{value:g}",
                "word": "recomputed",
                "command": "ecoformer cost --model pvt_v2_b0",
                "note": "taken over: the model's premise",
            }


def _list_models(results: Results) -> Iterator[dict[str, Value]]:
    entries = {entry.model: entry for entry in ZOO.values()}
    for row in describe_models():
        variant, kind = str(row["name"]).split("/")
        start: dict[str, Value] = {"table": "models, ImageNet-1k", "row": row["name"]}
        entry = entries[variant] if kind == "ecoformer" else None
        yield from _list_costs(start, row, "ecoformer tables main", entry)
        found = results.find("main", name=row["name"])
        yield start | _describe_throughput(found, entry)
        published = _publish(entry.top1 if entry else None)
        yield start | published | _describe_imagenet(found, f"{variant}/{kind}")


def _list_costs(
    start: Mapping[str, Value], cost: Row, command: str, entry: ZooEntry | None = None
) -> Iterator[dict[str, Value]]:
    for key, quantity, unit, digits, field in _COSTS:
        value = cost[key]
        assert isinstance(value, (int, float))
        published = _publish(getattr(entry, field) if entry and field else None)
        row = {**start, "quantity": quantity, **published, "ours": f"{value / unit:.{digits}f}"}
        row |= {"word": "recomputed", "command": command}
        column = Column(key, quantity, scale=unit, published="published")
        if column.differs({key: value, **published}):
            row["note"] = (
                "the published value is a slip: the released counter gives ours, and the published "
                "energy agrees with it"
            )
        yield row


def _publish(value: float | None) -> dict[str, Value]:
    return {} if value is None else {"published": value, "source": _README}


def _describe_throughput(
    found: tuple[Row, Mapping[str, str], str] | None, entry: ZooEntry | None
) -> dict[str, Value]:
    cells: dict[str, Value] = {
        "quantity": "images/s, RTX 3090, batches of 32",
        **_publish(entry.throughput_img_s if entry else None),
        "command": "ecoformer tables main --throughput",
    }
    if found is None or not found[0].get("images_per_s"):
        return cells | {
            "word": "not run",
            "note": "needs an RTX 3090; on other hardware it is a stand-in",
        }
    row, environment, _ = found
    hardware = str(row.get("hardware") or environment["hardware"])
    batch_size = row.get("batch_size", "")
    is_same = "RTX 3090" in hardware and str(batch_size) == "32"
    return cells | {
        "ours": f"{row['images_per_s']:.4g}",
        "word": "measured" if is_same else "stand-in",
        "note": f"{hardware}, batches of {batch_size}"
        + ("" if is_same else ", in place of an RTX 3090, which is not here"),
    }


def _describe_imagenet(
    found: tuple[Row, Mapping[str, str], str] | None, name: str
) -> dict[str, Value]:
    cells: dict[str, Value] = {"quantity": "top-1, ImageNet-1k, %"}
    if name.endswith("/ecoformer"):
        cells["command"] = "ecoformer tables main --data-path IMAGENET"
        weights = "of the release"
    else:
        cells["command"] = f"ecoformer tables main --data-path IMAGENET --weights {name}=CHECKPOINT"
        weights = "of a stage 1 of 100 epochs, since none were released"
    if found and found[0].get("top1") is not None and found[0].get("data_set") == "IMNET":
        return cells | {"ours": f"{found[0]['top1']:.2f}", "word": "measured"}
    return cells | {"word": "not run", "note": f"{_IMAGENET} {weights}"}


def _list_kinds(results: Results) -> Iterator[dict[str, Value]]:
    table = "kinds of attention"
    family = find_family("pvt_v2_b0")
    costs = {
        kind: describe_cost("pvt_v2_b0", kind, input_size=224, is_executed_counted=False)
        for kind in family.kinds("pvt_v2_b0")
    }
    ours, theirs = (float(costs[kind]["energy_pj"] or 0) for kind in ("ecoformer", "msa"))
    abstract: dict[str, Value] = {
        "table": table,
        "row": "PVTv2-B0, EcoFormer against softmax",
        "source": _ABSTRACT,
    }
    yield abstract | {
        "quantity": "energy saved, %",
        "published": 73,
        "ours": f"{100 * (1 - ours / theirs):.1f}",
        "word": "recomputed",
        "command": "ecoformer tables energy",
    }
    yield abstract | {
        "quantity": "top-1 lost on ImageNet-1k, points",
        "published": 0.33,
        "word": "not run",
        "command": "torchrun --nproc_per_node=8 -m pvt.main --config "
        "configs/pvt_v2/pvt_v2_b0_ecoformer.py --data-path IMAGENET --finetune STAGE1",
        "note": "needs ImageNet-1k, and both stages of training, 130 epochs",
    }
    for kind, cost in costs.items():
        label = family.label(kind)
        start: dict[str, Value] = {"table": table, "row": f"PVTv2-B0, {label}"}
        yield from _list_costs(start, cost, "ecoformer tables energy")
        found = results.find("kinds", name=label)
        yield start | _describe_accuracy(found, _KINDS_COMMAND)


def _list_settings(results: Results) -> Iterator[dict[str, Value]]:
    for ablation, table, flag in (
        ("bits", "bits of a code", "--nbits"),
        ("anchors", "anchors", "--anchor"),
        ("similar", "similar pairs a token", ""),
    ):
        for arm in list_arms(ablation, "pvt_v2_b0"):
            start: dict[str, Value] = {"table": table, "row": f"PVTv2-B0, {arm.name}"}
            # Similar pairs are looked for in the fit alone.
            if ablation != "similar":
                cost = describe_cost(
                    "pvt_v2_b0",
                    arm.attention,
                    input_size=224,
                    hashing=arm.config,
                    is_executed_counted=False,
                )
                command = f"ecoformer cost --model pvt_v2_b0 {flag} {arm.name.split()[-1]}"
                yield from _list_costs(start, cost, command)
            found = results.find(ablation, name=arm.name)
            yield start | _describe_accuracy(found, f"ecoformer tables {ablation} --seeds 0 1 2")


def _describe_accuracy(
    found: tuple[Row, Mapping[str, str], str] | None, command: str
) -> dict[str, Value]:
    """Describe a mean over seeds of a table of ablations."""
    cells: dict[str, Value] = {"quantity": "top-1, %", "command": command}
    if found is None or found[0].get("top1") is None:
        return cells | {"word": "not run", "note": "trains in minutes to hours on a CPU"}
    row, _, note = found
    # "pvt_v2_b0, FMNIST, 32 px. Costs ..."
    what = note.partition(".")[0]
    is_papers = "IMNET, 224 px" in what
    interval = row.get("top1_ci95")
    seeds = f"{row['num_seeds']:g} seeds, {row['epochs']:g} epochs"
    return cells | {
        "ours": f"{row['top1']:.2f}" + (f" +- {interval:.2f}" if interval is not None else ""),
        "word": "measured" if is_papers else "stand-in",
        "note": f"{what}; {seeds}"
        + ("" if is_papers else "; in place of ImageNet-1k, which takes GPUs for weeks"),
    }


def _list_long_sequences() -> Iterator[dict[str, Value]]:
    for task in ("ListOps", "Pathfinder"):
        for name, kind in _LONG_KINDS.items():
            value = PUBLISHED[task.upper()].get(name)
            yield {
                "table": "long sequences",
                "row": f"{task}, {name}",
                "quantity": "accuracy, %",
                **({} if value is None else {"published": value, "source": _HARNESS}),
                "word": "not run",
                "command": f"ecoformer train --config configs/sequence/{task.lower()}.py "
                f"--attn_type {kind}",
                "note": "needs 50,000 steps for each of 3 seeds; published on other files",
            }


def _list_figures() -> Iterator[dict[str, Value]]:
    for row, name, word, command, note in (
        (
            "the method (framework.png of the released README)",
            "method.png",
            "recomputed",
            "ecoformer plots method",
            "drawn anew, by the package's own operations",
        ),
        (
            "time and memory against tokens",
            "scaling.png",
            "stand-in",
            "ecoformer benchmark attention --plot FILE.png",
            "two CPU cores in place of a GPU, which is not here",
        ),
    ):
        yield {
            "table": "figures",
            "row": row,
            "quantity": "picture",
            "ours": f".github/assets/{name}",
            "word": word,
            "command": command,
            "note": note,
        }
