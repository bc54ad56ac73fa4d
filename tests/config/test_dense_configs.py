"""The files for detection and segmentation: what they say, and what they train."""

from __future__ import annotations

import ast
import re
import shlex
from itertools import groupby
from pathlib import Path

import pytest
from torch import nn

import pvt
import twins
from ecoformer.config import Config, make_config, parse_config
from ecoformer.engine.optim import create_optimizer, create_schedule, scale_learning_rate
from ecoformer.errors import InputError

ROOT = Path(__file__).parents[2]
FILES = [
    path.relative_to(ROOT)
    for task in ("detection", "segmentation")
    for path in sorted((ROOT / "configs" / task).glob("*.py"))
]
FAMILIES = {"pvt": pvt.FAMILY, "twins": twins.FAMILY}
COMMAND = re.compile(r"torchrun --nproc_per_node=8 -m (\w+)\.main (.*)", re.DOTALL)


def rates(config: Config) -> list[float]:
    """Of each epoch, on 8 ranks."""
    peak = scale_learning_rate(config.optim, batch_size=config.data.batch_size, world_size=8)
    optimizer = create_optimizer(nn.Linear(2, 2), config.optim, peak)
    schedule = create_schedule(optimizer, config.optim, seed=0)
    found = []
    for epoch in range(config.optim.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step(epoch, 0.0)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_command_trains_the_published_schedule(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc
    command = COMMAND.search(doc)
    assert command
    config = parse_config(shlex.split(command[2].replace("\\\n", " ")), FAMILIES[command[1]])
    name = f"{config.model.model}_{config.model.attn_type}"
    assert path.stem in (f"retinanet_{name}", f"semantic_fpn_{name}")
    assert (path.parent.name, path.stem) == (config.run.task, Path(config.run.output_dir).name)
    start = config.run.finetune or ""
    assert start == (
        f"runs/{name}/best_checkpoint.pth"
        if config.model.attn_type == "ecoformer"
        else f"{config.model.model}.pth"
    )
    # Drop path as from nothing, and no augmentation but a flip.
    assert config.run.is_train_mode and not config.data.repeated_aug
    assert config.optim.weight_decay == 1e-4 and config.data.batch_size * 8 == 16
    curve = rates(config)
    if config.run.task == "detection":
        steps = [(rate, len(list(group))) for rate, group in groupby(curve)]
        assert [count for _, count in steps] == [8, 3, 1]
        assert [rate for rate, _ in steps] == pytest.approx([1e-4, 1e-5, 1e-6])
        assert (config.data.short_side, config.data.long_side) == (800, 1333)
    else:
        assert (config.data.epoch_samples or 0) // 16 * config.optim.epochs == 80_000
        # Epochs 0 and 1 share a value, as with every schedule.
        expected = [1e-4 * (1 - max(epoch - 1, 0) / 80) ** 0.9 for epoch in range(80)]
        assert curve == pytest.approx(expected)
        assert config.data.short_side == 512


def test_a_file_and_a_flag_beat_the_recipe_of_a_task(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text('task = "detection"\nepochs = 3\ndecay_milestones = (2,)\n')
    config = parse_config(["--config", str(file), "--weight-decay", "0.1"], pvt.FAMILY)
    assert (config.optim.epochs, config.optim.decay_milestones) == (3, (2,))
    assert (config.optim.weight_decay, config.optim.sched) == (0.1, "multistep")
    # The family's, which no other task loses.
    assert config.model.drop_path == 0.1
    assert parse_config([], pvt.FAMILY).data.repeated_aug


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sched": "multistep", "task": "classification"}, "give --decay-milestones 8 11"),
        ({"decay_milestones": [8, 8]}, "expected rising numbers of epochs"),
        ({"decay_milestones": [0, 8]}, "expected rising numbers of epochs"),
        ({"short_side": 31}, "short_side is 31; expected at least 32 pixels"),
    ],
)
def test_what_cannot_be_set(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_config(**{"model": "pvt_v2_b0", "task": "detection", **fields})
