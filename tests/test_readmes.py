"""The READMEs: every snippet runs, every command is accepted, every default and link is true.

A README is read from top to bottom, in a folder that has what a reader's clone has, with tiny data
and weights in the place of large ones. A command is first parsed exactly as it is typed, then run
with ``ADDITIONS``, in this process. A block or command that nobody here knows fails.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

import pvt
import twins
from ecoformer import count_cost, export_released
from ecoformer.checkpoint.zoo import ZOO
from ecoformer.config import Config, parse_config
from ecoformer.config.released import find_field
from ecoformer.data.digits import load_digits
from ecoformer.hashing import with_random_hash_functions
from ecoformer.models.registry import ModelFamily
from ecoformer.models.sizes import PyramidSizes
from ecoformer.tools.export import parse as parse_export
from tests.tools.report.runs import write_run
from tests.twins.tiny import TINY_SVT

ROOT = Path(__file__).parents[1]
READMES = sorted(
    path.relative_to(ROOT)
    for pattern in (
        *("README.md", "[!.]*/README.md", "ecoformer/*/README.md"),
        *(".github/*/README.md", "tests/*/README.md"),
    )
    for path in ROOT.glob(pattern)
)
MAX_LINES = {"README.md": 150, "ecoformer/README.md": 120}

FAMILIES = {"pvt.main": pvt.FAMILY, "twins.main": twins.FAMILY}
ONE_STEP = (
    *("--epochs", "1", "--warmup-epochs", "0", "--no-repeated-aug", "--num-fit-steps", "1"),
    *("--input-size", "32", "--batch-size", "8", "--num_workers", "0", "--device", "cpu"),
)
# Behind the words of a command, where they make it take seconds; the longest beginning counts.
ADDITIONS: dict[str, Sequence[str]] = {
    "pvt.main": ONE_STEP,
    "pvt.main --model pvt_v2_b0 --attn_type msa --data-set DIGITS": (
        *ONE_STEP,
        *("--batch-size", "128"),
    ),
    "twins.main": ONE_STEP,
    "ecoformer train": ONE_STEP,
    "ecoformer eval": ONE_STEP,
    "ecoformer doctor": ("--device", "cpu"),
    "ecoformer tables energy": ("--device", "cpu", "--batch-size", "1"),
    "ecoformer tables kinds": ("--seeds", "0", "--batch-size", "8", "--device", "cpu"),
    "ecoformer benchmark": (
        *("--resolutions", "32", "--rounds", "1", "--batch-size", "1", "--device", "cpu"),
    ),
    "ecoformer benchmark data": (
        *("--resolutions", "40", "--rounds", "1", "--batch-size", "2", "--images", "4"),
    ),
    "ecoformer benchmark attention": (
        *("--resolutions", "32", "48", "64", "--rounds", "1", "--batch-size", "1"),
        *("--device", "cpu"),
    ),
}
INLINE = re.compile(r"`((?:ecoformer|python|make|torchrun|pytest|pip) [^`]+)`")


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a README."""

    readme: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.readme}:{self.line}"


def read_snippets(readme: Path) -> list[Snippet]:
    """All fenced blocks, in their order."""
    snippets, opened = list[Snippet](), None
    lines = (ROOT / readme).read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
        else:
            language = lines[opened - 1].removeprefix("```").strip()
            text = "\n".join(lines[opened : number - 1])
            snippets.append(Snippet(readme, opened, language, text))
            opened = None
    assert opened is None, f"{readme}:{opened}: the block is not closed"
    return snippets


def read_prose(readme: Path) -> str:
    """What stands outside of fenced blocks."""
    text = (ROOT / readme).read_text("utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def split_commands(text: str) -> list[list[str]]:
    """The commands of a shell snippet, as words."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            end = words.index("&&")
            commands.append(words[:end])
            words = words[end + 1 :]
        commands.append(words)
    return [words for words in commands if words]


# ------------------------------------------------------------------------------ a reader's folder


def write_images(root: Path) -> None:
    """Two classes: a step of eight images, and a batch to evaluate."""
    random = np.random.RandomState(0)
    for split, num_images in (("train", 8), ("val", 2)):
        for number in range(num_images):
            file = root / split / f"class{number % 2}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.randint(0, 256, (32, 32, 3)).astype(np.uint8)).save(file)


def write_fashion(root: Path) -> None:
    """Fashion-MNIST's four files, of ten images each."""
    root.mkdir()
    for split in ("train", "t10k"):
        for name, shape in (("images-idx3", (10, 28, 28)), ("labels-idx1", (10,))):
            values = np.arange(np.prod(shape)).reshape(shape) % 10
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
            file = root / f"{split}-{name}-ubyte.gz"
            file.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def write_weights(folder: Path) -> None:
    """Original weights, under the names that READMEs use."""
    torch.save(
        pvt.create_model("pvt_v2_b0", "sra", num_classes=5).state_dict(), folder / "pvt_v2_b0.pth"
    )
    model = twins.create_model("alt_gvt_small", "lsa_gsa", num_classes=5)
    torch.save(model.state_dict(), folder / "alt_gvt_small.pth")


def write_zoo(cache: Path, num_classes: int) -> None:
    """Files that stand for downloads."""
    cache.mkdir(parents=True, exist_ok=True)
    for name, family in (
        ("ecoformer_pvt_v2_b0", pvt.FAMILY),
        ("ecoformer_twins_svt_small", twins.FAMILY),
    ):
        model = family.create_model(ZOO[name].model, "ecoformer", num_classes=num_classes)
        state = export_released(with_random_hash_functions(model))
        torch.save(state, cache / ZOO[name].url.rsplit("/", 1)[-1])


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what snippets expect around them; the Twins are a few channels wide."""
    for name in ("configs", "environment", "tests", "pyproject.toml", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".github/assets").mkdir(parents=True)
    monkeypatch.setitem(twins.TWINS_VARIANTS, "alt_gvt_small", TINY_SVT)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(
        "ecoformer.data.datasets.load_digits",
        lambda split, *, size: tuple(part[:256] for part in load_digits(split, size=size)),
    )
    write_images(tmp_path / "IMAGENET")
    write_fashion(tmp_path / "FASHION")
    write_weights(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -------------------------------------------------------------------------------------- commands


class Parsed(Exception):
    """A command line was accepted, and nothing was done."""


@contextlib.contextmanager
def stop_when_parsed() -> Iterator[None]:
    """End a command in a block as soon as its words are understood."""

    def parse(parser: argparse.ArgumentParser, *args: object, **keywords: object) -> object:
        real(parser, *args, **keywords)
        raise Parsed

    real = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        yield


def find_main(module: str) -> Callable[[Sequence[str]], int]:
    """What ``python -m module`` runs."""
    name = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    main: Callable[[Sequence[str]], int] = importlib.import_module(name).main
    return main


def parse(module: str, words: Sequence[str]) -> None:
    """Accept the words of a command as its own parser does, and do nothing."""
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            find_main(module)(words)
    elif module == "ecoformer" and words[0] in ("train", "eval"):
        parse_config(words[1:])
    elif module == "ecoformer" and words[0] == "export":
        parse_export(words[1:])
    elif module in ("pvt.main", "twins.main"):
        parse_config(words, FAMILIES[module])
    elif module == "pytest":
        assert all((ROOT / word).exists() for word in words if "/" in word), words
    else:
        with stop_when_parsed():
            assert find_main(module)(words) == 0


def run_module(module: str, words: Sequence[str], *, dry: bool) -> None:
    """``python -m module words``."""
    if words and words[-1] == "...":
        words, dry = words[:-1], True
    command = " ".join([module, *words])
    additions = max(
        (key for key in ADDITIONS if f"{command} ".startswith(f"{key} ")), key=len, default=None
    )
    if dry or additions:
        parse(module, words)
    if dry:
        return
    words = [*words, *ADDITIONS[additions]] if additions else words
    # What the doctor finds of this machine is not ours.
    codes = (0, 2) if words[0] == "doctor" else (0,)
    assert find_main(module)(words) in codes, f"{command} failed"


def run_command(words: Sequence[str], *, dry: bool = False) -> None:
    """Run a command as far as a test can, or only parse it."""
    match words:
        case ["torchrun", *rest]:
            launcher = torchrun_parser().parse_args(rest)
            if launcher.training_script == "...":
                return
            assert launcher.module
            # One process for all ranks.
            run_module(launcher.training_script, launcher.training_script_args, dry=dry)
        case ["python", "-m", module, *rest]:
            run_module(module, rest, dry=dry)
        case ["ecoformer", *rest] if rest:
            run_module("ecoformer", rest, dry=dry)
        case ["pytest", *rest]:
            parse("pytest", rest)
        case ["python", "-c", code]:
            exec(code, {})
        case ["make", *rest]:
            check_make(rest)
        case ["sbatch", *rest]:
            script = next(word for word in rest if not word.startswith("-"))
            assert (ROOT / script).is_file()
            module, *flags = rest[rest.index(script) + 1 :]
            run_module(module, flags, dry=True)
        case ["pip", "install", "--editable", target]:
            assert re.fullmatch(r"\.(\[\w+(,\w+)*\])?", target)
            extras = re.findall(r"\w+", target)
            project = (ROOT / "pyproject.toml").read_text("utf-8")
            assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras)
        case ["pip", "install" | "uninstall", *packages]:
            project = (ROOT / "pyproject.toml").read_text("utf-8")
            assert all(re.search(rf'^ +"{name}\W', project, re.M) for name in packages)
        case ["conda", "env", "create", "-f", file]:
            assert (ROOT / file).is_file()
        case ["conda", "activate", name]:
            assert f"name: {name}" in (ROOT / "environment/environment.yml").read_text()
        case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
            pass
        case ["export", *settings]:
            assert all(re.fullmatch(r"[A-Z_]+=\w+", setting) for setting in settings)
        case _:
            pytest.fail(f"nobody here knows how to run: {shlex.join(words)}")


def check_make(words: Sequence[str]) -> None:
    """The target is there, and the command that it ends in is accepted."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    command = shlex.split(done.stdout.splitlines()[-1])
    if command[2].startswith(("ecoformer", "pytest")):
        run_command(["python", *command[1:]], dry=True)


def run_python(text: str) -> None:
    """Execute a snippet; what it prints is what its comments say, numbers to the digits given."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, "snippet", "exec"), {"__name__": "snippet"})
    expected = re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE)
    lines = printed.getvalue().splitlines()
    assert len(lines) == len(expected), lines
    for line, said in zip(lines, expected, strict=True):
        if number := re.match(r"-?\d+\.(\d+)", said):
            line, said = f"{float(line):.{len(number[1])}f}", number[0]
        assert line == said


# ----------------------------------------------------------------------------------------- tests


def check_demo_output(text: str) -> None:
    """The costs that the demo prints; its accuracies and times are measured."""
    rows = {
        words[0]: words for line in text.splitlines() if (words := line.replace("|", " ").split())
    }
    for label, kind in (("softmax", "msa"), ("EcoFormer", "ecoformer")):
        cost = count_cost(pvt.create_model("pvt_v2_b0", kind, num_classes=10), 64)
        numbers = (cost.mul / 1e6, cost.add / 1e6, cost.energy_pj / 1e9)
        digits = zip(numbers, (1, 1, 3), strict=True)
        assert rows[label][2:5] == [f"{number:.{places}f}" for number, places in digits]


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_snippets_run(readme: Path, clone: Path) -> None:
    for snippet in read_snippets(readme):
        is_python = snippet.language == "python"
        if "ecoformer_" in snippet.text:
            write_zoo(clone / "hub/checkpoints", num_classes=1000 if is_python else 2)
        try:
            if is_python:
                run_python(snippet.text)
            elif snippet.language == "text":
                check_demo_output(snippet.text)
            else:
                assert snippet.language in ("shell", ""), f"nobody runs {snippet.language}"
                for words in split_commands(snippet.text):
                    run_command(words)
        except Exception as error:
            raise AssertionError(f"{snippet}: {error}") from error


def read_commands(readme: Path) -> Iterator[list[str]]:
    """Commands in backticks outside of blocks."""
    for command in INLINE.findall(read_prose(readme)):
        words = shlex.split(" ".join(command.split()))
        # It stands for all commands.
        if "COMMAND" not in words:
            yield words


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_commands_in_the_text_are_accepted(readme: Path, clone: Path) -> None:
    for words in read_commands(readme):
        run_command(words, dry=True)


@pytest.mark.slow
@pytest.mark.parametrize("readme", ["README.md", ".github/assets/README.md"])
def test_commands_behind_figures_run(readme: str, clone: Path) -> None:
    for kind in ("msa", "ecoformer"):  # as `make demo` leaves them
        write_run(clone / "runs/demo_pvt" / kind, kind)
    for words in read_commands(Path(readme)):
        run_command(words)


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_what_it_names_is_there(readme: Path) -> None:
    text = (ROOT / readme).read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / readme).parent / path if path else ROOT / readme
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, target
    for path in re.findall(r"`((?:ecoformer|pvt|twins|tests|configs|environment)/[\w./]*)`", text):
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path
    for name in re.findall(r"`(\w+\.py)`", text):
        assert any(next((ROOT / top).rglob(name), None) for top in ("ecoformer", "pvt", "tests")), (
            name
        )


def test_the_tour_passes_every_file_of_the_engine() -> None:
    tour = (ROOT / "ecoformer/README.md").read_text("utf-8")
    for path in (ROOT / "ecoformer/engine").glob("[!_]*.py"):
        assert f"`{path.name}`" in tour


@pytest.mark.parametrize(("readme", "limit"), MAX_LINES.items())
def test_it_is_short(readme: str, limit: int) -> None:
    assert len((ROOT / readme).read_text("utf-8").splitlines()) <= limit


def test_nothing_stands_twice() -> None:
    seen: dict[str, Path] = {}
    for readme in READMES:
        for line in read_prose(readme).splitlines():
            assert len(line) < 70 or seen.setdefault(line, readme) == readme, line


def read_rows(readme: str, *, columns: int) -> dict[str, list[str]]:
    """Rows of tables of so many columns that begin with one name in backticks."""
    rows = {}
    for line in (ROOT / readme).read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == columns and (name := re.fullmatch(r"`([^`]+)`", cells[0])):
            rows[name[1]] = cells[1:]
    return rows


def assert_defaults(family: ModelFamily, defaults: dict[str, str]) -> None:
    """Giving a flag its default changes nothing; what is not a value follows from others."""
    words = []
    for flag, default in defaults.items():
        if default in ("on", "off"):
            words.append(flag if default == "on" else "--no-" + flag.removeprefix("--"))
        elif not default.startswith("by ") and default != "nothing":
            words += [flag, *default.strip("`").split()]
    assert parse_config(words, family) == parse_config([], family)


def test_all_flags_are_listed_with_their_defaults() -> None:
    rows = read_rows("pvt/README.md", columns=3)
    flags = {flag: cells[0] for flag, cells in rows.items() if flag.startswith("--")}
    assert {find_field(flag) for flag in flags} == Config().to_flat().keys()
    assert_defaults(pvt.FAMILY, flags)


def test_defaults_of_twins() -> None:
    rows = read_rows("twins/README.md", columns=2)
    flags = {flag: cells[0] for flag, cells in rows.items() if flag.startswith("--")}
    assert {find_field(flag) for flag in flags} == {"model", *twins.FAMILY.recipe}
    assert_defaults(twins.FAMILY, flags)


@pytest.mark.parametrize(
    ("readme", "variants"),
    [("pvt/README.md", pvt.PVT_VARIANTS), ("twins/README.md", twins.TWINS_VARIANTS)],
)
def test_variants_are_listed(readme: str, variants: dict[str, PyramidSizes]) -> None:
    rows = read_rows(readme, columns=4)
    assert {name: tuple(cells[:2]) for name, cells in rows.items()} == {
        name: (" ".join(map(str, sizes.embed_dims)), " ".join(map(str, sizes.depths)))
        for name, sizes in variants.items()
    }


def read_table(name: str) -> list[dict[str, str]]:
    """Rows of a committed table by its header."""
    lines = (ROOT / f".github/results/{name}.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    header, _, *body = rows
    return [dict(zip(header, cells, strict=True)) for cells in body]


def test_figures_are_those_of_the_results() -> None:
    """Energy and accuracy; published figures are held in tests/checkpoint/test_zoo.py."""
    readme = (ROOT / "README.md").read_text("utf-8")
    for row in read_table("energy"):
        is_readmes = (row["model"], row["px"]) == ("pvt_v2_b0", "224")
        if is_readmes and row["attention"] in ("sra", "performer", "ecoformer"):
            numbers = (row["#Mul G"], row["#Add G"], row["energy mJ"])
            saved = (f"{row['energy saved %']} %", f"{row['executed saved %']} %")
            assert f"| {' | '.join((*numbers, *saved))} |" in readme
        if (row["model"], row["attention"]) == ("pvt_v2_b0", "ecoformer") and row["px"] != "512":
            most, least = (f"{float(x):.0f}" for x in row["with DRAM saved %"].split(" to "))
            assert f"{most} to {least} %" in " ".join(readme.split())
    for row in json.loads((ROOT / ".github/results/pairs.json").read_text("utf-8"))["rows"]:
        if row["name"] in ("softmax", "Performer", "EcoFormer", "EcoFormer, normalized bias"):
            assert f"| {row['top1']:.1f} ± {row['top1_ci95']:.1f} |" in readme
    for row in read_table("main"):
        variant, kind = row["model"].split("/")
        if kind == "ecoformer":
            assert re.search(rf"`{variant}` .* {row['energy saved %']} % \|", readme)


@pytest.mark.slow
def test_stages_run_on_two_ranks(clone: Path) -> None:
    """The README's first commands, by torchrun itself."""
    snippet = next(s for s in read_snippets(Path("README.md")) if "-m pvt.main" in s.text)
    # Larger images, so that half of the batch still has the tokens that a fit needs.
    halves = ("--batch-size", "4", "--input-size", "64")
    for words in split_commands(snippet.text)[:2]:
        words = ["--nproc_per_node=2" if word.startswith("--nproc") else word for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words[1:], *ONE_STEP, *halves],
            capture_output=True,
            text=True,
        )
        assert not done.returncode, done.stderr
    assert (clone / "runs/pvt_v2_b0_ecoformer/last_checkpoint.pth").exists()
