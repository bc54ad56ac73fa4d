"""Weight files with damaged bits: refused, or the same weights, and never others in silence."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ecoformer.checkpoint import load_checkpoint, read_checkpoint, save_atomic
from ecoformer.checkpoint.files import save_safetensors
from ecoformer.errors import InputError
from tests.checkpoint.weights import Entries

_generator = torch.Generator().manual_seed(0)
WEIGHTS = {
    f"block{index}.{name}": torch.randn(shape, generator=_generator)
    for index in range(3)
    for name, shape in {"weight": (6, 8), "bias": (8,), "other": (8,)}.items()
} | {"block0.is_fitted": torch.tensor(True), "count": torch.arange(8)}
NUM_SAMPLED, NUM_ALL = 100, 3000


def forms(folder: Path) -> dict[str, bytes]:
    """The same weights in each format; the first two are of others."""
    save_atomic(WEIGHTS, folder / "a.pth")
    save_safetensors(WEIGHTS, folder / "a.safetensors", {"format": "pt"})
    archive, legacy = io.BytesIO(), io.BytesIO()
    torch.save(WEIGHTS, archive)
    torch.save(WEIGHTS, legacy, _use_new_zipfile_serialization=False)
    return {
        "legacy": legacy.getvalue(),
        "safetensors": safetensors.torch.save(WEIGHTS),
        "archive": archive.getvalue(),
        "our archive": (folder / "a.pth").read_bytes(),
        "our safetensors": (folder / "a.safetensors").read_bytes(),
    }


def flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def overwrite(data: bytes, draw: random.Random) -> bytes:
    place, length = draw.randrange(len(data)), draw.randrange(1, 65)
    noise = bytes(length) if draw.random() < 0.3 else draw.randbytes(length)
    return (data[:place] + noise + data[place + length :])[: len(data)]


def move(data: bytes, draw: random.Random) -> bytes:
    start, end, place = sorted(draw.randrange(len(data)) for _ in range(3))
    return data[:start] + data[end:place] + data[start:end] + data[place:]


def resize(data: bytes, draw: random.Random) -> bytes:
    place, length = draw.randrange(len(data)), draw.randrange(1, 65)
    if draw.random() < 0.5:
        return data[:place] + data[place + length :]
    return data[:place] + draw.randbytes(length) + data[place:]


def rearrange(data: bytes, draw: random.Random) -> bytes:
    """Swap, double, rename, leave out or replace members, with checksums that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        members = [(name, old.read(name)) for name in old.namelist()]
        one, other = draw.sample(range(len(members)), 2)
        (name, content), (other_name, other_content) = members[one], members[other]
        match draw.randrange(6):
            case 0:
                members[one], members[other] = (name, other_content), (other_name, content)
            case 1:
                members.append((name, other_content))
            case 2:
                members[one] = (f"{name}x", content)
            case 3:
                del members[one]
            case 4:
                members[one] = (name, flip(content, draw) if content else b"x")
            case 5:
                members[one], members[other] = members[other], members[one]
        for member in members:
            new.writestr(*member)
    return buffer.getvalue()


def lie(data: bytes, draw: random.Random) -> bytes:
    """Swap or change what the header of safetensors says."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.sample(names, 2)
    match draw.randrange(5):
        case 0:
            header[one], header[other] = header[other], header[one]
        case 1:
            header[one]["shape"] = header[one]["shape"][::-1]
        case 2:
            header[one]["dtype"] = draw.choice(["F32", "I32", "F16", "F64", "BOOL", "F8_E4M3"])
        case 3:
            header[one]["data_offsets"][draw.randrange(2)] += draw.choice([-4, 4, 2**40])
        case 4:
            header[f"{one}x"] = header.pop(one)
    text = json.dumps(header).encode()
    claimed = len(text) + (draw.choice([0, 0, 0, 1, -1, 2**20]))
    return claimed.to_bytes(8, "little") + text + data[8 + length :]


def nest(data: bytes, draw: random.Random) -> bytes:
    """Put what the file holds into lists, or lists that unfold into it."""
    depth = draw.randrange(1, 200)
    if data.startswith(b"PK"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name.endswith("data.pkl"):
                    content = content[:2] + b"]" * depth + content[2:-1] + b"a" * depth + b"."
                new.writestr(name, content)
        return buffer.getvalue()
    length = int.from_bytes(data[:8], "little")
    nested = b'{"x":' + b"[" * depth + b"]" * depth + b"," + data[9 : 8 + length]
    return len(nested).to_bytes(8, "little") + nested + data[8 + length :]


MUTATIONS: dict[str, list[Callable[[bytes, random.Random], bytes]]] = {
    "legacy": [flip, overwrite, move, resize],
    "safetensors": [flip, overwrite, move, resize, lie, nest],
    "archive": [flip, overwrite, move, resize, rearrange, nest],
}


def check(form: str, data: bytes, path: Path) -> str:
    """Read a damaged file into a model, and tell what became of it."""
    path.write_bytes(data)
    model = Entries(WEIGHTS)
    try:
        report = load_checkpoint(model, path, strict=True)
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return "refused"
    found = model.state_dict()
    if all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items()):
        return "equal"
    assert not form.startswith("our")
    assert any("Nothing vouches" in note or "was changed" in note for note in report.notes)
    return "changed, and said"


def mutate(tmp_path: Path, num_mutations: int, seed: int) -> dict[str, dict[str, int]]:
    """Damage each form in turn; return how often it was refused, equal, or changed."""
    contents = forms(tmp_path)
    found: dict[str, dict[str, int]] = {form: {} for form in contents}
    for number in range(num_mutations):
        draw = random.Random(seed + number)
        form = list(contents)[number % len(contents)]
        mutation = draw.choice(MUTATIONS[form.removeprefix("our ")])
        data = mutation(contents[form], draw)
        outcome = check(form, data, tmp_path / "weights.pth")
        found[form][outcome] = found[form].get(outcome, 0) + 1
    return found


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_sampled_mutations_are_refused_or_change_nothing(tmp_path: Path) -> None:
    found = mutate(tmp_path, NUM_SAMPLED, seed=0)
    assert sum(counts.get("refused", 0) for counts in found.values()) > NUM_SAMPLED / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_mutations_are_refused_or_change_nothing(tmp_path: Path) -> None:
    mutate(tmp_path, NUM_ALL, seed=NUM_SAMPLED)


def test_bits_of_a_small_file_of_ours(tmp_path: Path) -> None:
    save_safetensors({"w": torch.arange(3.0)}, tmp_path / "a.safetensors", {})
    data = (tmp_path / "a.safetensors").read_bytes()
    num_refused = 0
    places = range(0, 8 * len(data), 7)
    for place in places:
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / "b.safetensors").write_bytes(damaged)
        try:
            found = read_checkpoint(tmp_path / "b.safetensors")
        except InputError:
            num_refused += 1
        else:
            # Of the digest's own name, or of blanks.
            assert found["model"]["w"].tolist() == [0, 1, 2]
    assert num_refused > 0.8 * len(places)


def test_an_archive_without_checksums_is_read_and_said(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(found["model"]["count"], WEIGHTS["count"])
    assert found.notes == (
        "Nothing vouches for the file's bits: the archive was written without checksums",
    )


def test_an_archive_that_was_packed_again_is_read_and_said(tmp_path: Path) -> None:
    data = forms(tmp_path)["archive"]
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w") as new,
    ):
        names = old.namelist()
        for name in [*names[1:-1], names[0], names[-1]]:
            new.writestr(name, old.read(name))
    found = read_checkpoint(tmp_path / "b.pth")
    assert torch.equal(found["model"]["count"], WEIGHTS["count"])
    assert "changed after PyTorch had written it" in found.notes[0]


def test_files_of_ours_are_what_others_read(tmp_path: Path) -> None:
    forms(tmp_path)
    readers: dict[str, Callable[[Path], dict[str, Tensor]]] = {
        "a.pth": torch.load,
        "a.safetensors": safetensors.torch.load_file,
    }
    for name, read in readers.items():
        found = read(tmp_path / name)
        assert found.keys() == WEIGHTS.keys()
        assert all(torch.equal(found[entry], WEIGHTS[entry]) for entry in WEIGHTS)
        assert read_checkpoint(tmp_path / name).notes == ()


def test_the_same_weights_are_the_same_file(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        save_atomic(WEIGHTS, tmp_path / name)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
