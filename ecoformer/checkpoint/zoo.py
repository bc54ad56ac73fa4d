"""Where weights come from: a path, a URL, or the name of a released checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

import torch

from ecoformer.checkpoint.files import parse_checkpoint
from ecoformer.errors import InputError, suggest
from ecoformer.files import open_atomic, remove_stale

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RELEASE = "https://github.com/ziplab/EcoFormer/releases/download/v1.0"
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZooEntry:
    """A released checkpoint and what was published about it, on ImageNet-1k.

    Args:
        model: the variant that it belongs to; its attention is ``"ecoformer"``.
        url: where it lies.
        top1: accuracy, percent.
        mul_g: multiplications for one image, 10^9.
        add_g: additions for one image, 10^9.
        energy_g_pj: energy for one image, 10^9 pJ.
        throughput_img_s: images a second on an RTX 3090.
        sha256: of the file, once a person has verified it.
        input_size: side of the images, pixels.
        mean: of the images' channels, subtracted before the model.
        std: of the images' channels, divided by after that.
        licence: SPDX name.

    Source: table of models of the released implementation.
    """

    model: str
    url: str
    top1: float
    mul_g: float
    add_g: float
    energy_g_pj: float
    throughput_img_s: int
    sha256: str | None = None
    input_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    licence: str = "Apache-2.0"

    def timm_config(self) -> dict[str, object]:
        """Tell timm what it keeps of weights.

        Returns:
            Fields of timm's ``PretrainedCfg``.
        """
        return {
            "url": self.url,
            "input_size": (3, self.input_size, self.input_size),
            "mean": self.mean,
            "std": self.std,
            "license": self.licence.lower(),
        }


# Names as in timm's registry.
ZOO = {
    "ecoformer_pvt_v2_b0": ZooEntry(
        "pvt_v2_b0", f"{_RELEASE}/pvtv2_b0_ecoformer.pth", 70.44, 0.54, 0.56, 2.5, 1379
    ),
    "ecoformer_pvt_v2_b1": ZooEntry(
        "pvt_v2_b1", f"{_RELEASE}/pvtv2_b1_ecoformer.pth", 78.38, 2.03, 2.09, 9.4, 874
    ),
    "ecoformer_pvt_v2_b2": ZooEntry(
        "pvt_v2_b2", f"{_RELEASE}/pvtv2_b2_ecoformer.pth", 81.28, 3.85, 3.97, 17.8, 483
    ),
    # A slip of the published table: 6.72 G additions are counted, and give its energy.
    "ecoformer_pvt_v2_b3": ZooEntry(
        "pvt_v2_b3", f"{_RELEASE}/pvtv2_b3_ecoformer.pth", 81.96, 6.54, 6.75, 30.25, 325
    ),
    "ecoformer_pvt_v2_b4": ZooEntry(
        "pvt_v2_b4", f"{_RELEASE}/pvtv2_b4_ecoformer.pth", 81.9, 9.57, 9.82, 44.25, 249
    ),
    "ecoformer_twins_svt_small": ZooEntry(
        "alt_gvt_small", f"{_RELEASE}/twins_svt_s_ecoformer.pth", 80.22, 2.72, 2.81, 12.6, 576
    ),
}


def resolve_source(
    source: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Find the local file that a source stands for, and download it if there is none yet.

    Args:
        source: a path, a URL, with ``#sha256=...`` if it is to be verified, or a zoo name.
        cache_dir: where downloads lie; PyTorch's folder unless given.

    Returns:
        A path, at which there need not be a file if ``source`` is one.

    Raises:
        InputError: there is no such zoo name, no such home or address, the download fails, the
            file in the cache cannot be read, or a checksum is wrong.
    """
    text = os.fspath(source)
    try:
        return _resolve(text, cache_dir)
    except InputError:
        raise
    # Of a bad address, a home of nobody, or a disk.
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{text}: cannot be had ({error}); check how it is written, and the cache folder."
        ) from error


def _resolve(text: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    if "://" not in text:
        path = Path(text).expanduser()
        # A bare word that is no file can only be meant as a name.
        if os.path.exists(path) or path.suffix or path.name != text:
            return path
        if text not in ZOO:
            raise InputError(
                f"{text}: no such file or zoo name{suggest(text, ZOO)}"
                f" The zoo has: {', '.join(ZOO)}."
            )
        text = ZOO[text].url
    url, _, expected = text.partition("#sha256=")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise InputError(f"{text}: {parts.scheme} is not read; give https, or a file by its path.")
    remote = PurePosixPath(parts.path)
    entry = next((entry for entry in ZOO.values() if entry.url == url), None)
    if entry is not None:
        name, checksum = remote.name, expected or entry.sha256
    else:
        # Files of one name from two places are two files.
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        name, checksum = f"{remote.stem}-{digest}{remote.suffix}", expected or None
    folder = Path(cache_dir or f"{torch.hub.get_dir()}/checkpoints").expanduser()
    return _fetch(url, folder / name, checksum)


def _fetch(url: str, path: Path, expected: str | None) -> Path:
    """Download to a path unless a file is there, and verify it in either case."""
    if not path.exists():
        _logger.info("downloading %s to %s", url, path)
        # Who waits longer for a piece has given up.
        remove_stale(path, min_age_s=2 * _TIMEOUT_S)
        with open_atomic(path) as file:
            for chunk in _download(url, path):
                file.write(chunk)
            _verify(file, url, expected)
            # Where no checksum is known, no login page and no half file may enter the cache either.
            file.seek(0)
            parse_checkpoint(file, url)
    # Again where it lies: a person may have put it there.
    with open(path, "rb") as file:
        digest = _verify(file, str(path), expected)
    if expected is None:
        _logger.warning("%s: sha256 %s, not verified: no checksum is known yet", path, digest)
    return path


def _download(url: str, path: Path) -> Iterator[bytes]:
    """Yield what a URL serves, with a progress bar on terminals."""
    # Imported here: few runs download anything.
    from http.client import HTTPException
    from urllib.request import urlopen

    from tqdm import tqdm

    try:
        with urlopen(url, timeout=_TIMEOUT_S) as response:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:
                while chunk := response.read(_CHUNK_BYTES):
                    progress.update(len(chunk))
                    yield chunk
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(
            f"{url}: cannot be downloaded ({error}); repeat the command where there is a network, "
            f"or fetch the file elsewhere and put it at {path}."
        ) from error


def _verify(file: IO[bytes], what: str, expected: str | None) -> str:
    """Return the SHA-256 of a file, which has to be the expected one if that is known."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    found = digest.hexdigest()
    if expected is not None and found != expected.lower():
        raise InputError(
            f"{what}: its sha256 is {found}, expected {expected}; download it again (remove it "
            "first if it is here), or give the right checksum."
        )
    return found
