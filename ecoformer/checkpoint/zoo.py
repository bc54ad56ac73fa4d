"""Where weights come from: a path, a URL, or the name of a released checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch

from ecoformer.checkpoint.files import parse_checkpoint
from ecoformer.errors import InputError, suggest
from ecoformer.files import open_atomic, open_regular, remove_stale
from ecoformer.threads import call_within

_RELEASE = "https://github.com/ziplab/EcoFormer/releases/download/v1.0"
_CHUNK_BYTES = 1 << 20
# Of silence.
_TIMEOUT_S = 30
_MAX_BYTES = 16 * 2**30
# A download may take so long, and a second more for so many bytes that have come.
_PATIENCE_S = 60.0
_MIN_BYTES_PER_S = 10_000

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZooEntry:
    """A released checkpoint and what was published about it, on ImageNet-1k.

    ``top1`` is in percent; operations of one image in 10^9, its energy in 10^9 pJ; images a second
    on an RTX 3090. ``sha256`` is None until a person has verified the file. Its attention is
    ``"ecoformer"``.

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

    def timm_config(self) -> dict[str, object]:
        """Give the fields of timm's ``PretrainedCfg``."""
        return {
            "url": self.url,
            "input_size": (3, self.input_size, self.input_size),
            # Of ImageNet.
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "license": "apache-2.0",
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
        InputError: there is no such zoo name, no such home or address, the download fails, is too
            slow or too large, the file in the cache cannot be read, or a checksum is wrong.
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
    url, mark, fragment = text.partition("#")
    named = re.fullmatch("sha256=([0-9a-f]{64})", fragment, re.IGNORECASE)
    if mark and not named:
        raise InputError(
            f"{text}: after # an address has sha256= and 64 hexadecimal digits; give all of them, "
            "or leave the # out."
        )
    expected = named[1].lower() if named else None
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
        name, checksum = f"{remote.stem}-{digest}{remote.suffix}", expected
    folder = Path(cache_dir or f"{torch.hub.get_dir()}/checkpoints").expanduser()
    return _fetch(url, folder / name, checksum)


def _fetch(url: str, path: Path, expected: str | None) -> Path:
    """Download to a path unless a file is there, and verify it in either case."""
    if not path.exists():
        _logger.info("downloading %s to %s", url, path)
        # Who waits longer for a piece has given up.
        remove_stale(path, min_age_s=2 * _TIMEOUT_S)
        with open_atomic(path) as file:
            num_promised = _download(url, path, file)
            num_bytes = file.tell()
            _verify(file, url, expected)
            if num_promised not in (None, num_bytes):
                raise InputError(
                    f"{url}: damaged, cut short: {num_bytes} of {num_promised} bytes came; repeat "
                    "the command."
                )
            # Where no checksum is known, no login page and no half file may enter the cache either.
            file.seek(0)
            parse_checkpoint(file, url)
    # Again where it lies: a person may have put it there.
    with open_regular(path) as file:
        digest = _verify(file, str(path), expected)
    if expected is None:
        _logger.warning("%s: sha256 %s, not verified: no checksum is known yet", path, digest)
    return path


def _download(url: str, path: Path, file: IO[bytes]) -> int | None:
    """Write what a URL serves into a file; return the number of bytes promised, if one was."""
    # Imported here: few runs download anything.
    from tqdm import tqdm

    began, num_bytes = time.monotonic(), 0
    try:
        with _open_url(url) as response:
            length = response.headers.get("Content-Length")
            total = None if length is None else int(length)
            if total and total > _MAX_BYTES:
                raise ValueError(f"{total} bytes, more than {_MAX_BYTES}")
            with tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:
                # One system call each: a piece of full size may take days to come.
                while chunk := response.read1(_CHUNK_BYTES):
                    num_bytes += len(chunk)
                    elapsed_s = time.monotonic() - began
                    if num_bytes > _MAX_BYTES:
                        raise ValueError(f"no end after {_MAX_BYTES} bytes")
                    if elapsed_s > _PATIENCE_S + num_bytes / _MIN_BYTES_PER_S:
                        raise TimeoutError(f"too slow, {num_bytes} bytes in {elapsed_s:.0f} s")
                    progress.update(len(chunk))
                    file.write(chunk)
            return total
    except (OSError, ValueError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{url}: cannot be downloaded ({reason}); repeat the command where there is a network, "
            f"or fetch the file elsewhere and put it at {path}."
        ) from error


def _open_url(url: str) -> Any:
    """Ask for a URL; the answer may come drop by drop."""
    opener = build_opener(_Redirects)
    return call_within(_PATIENCE_S, lambda: opener.open(url, timeout=_TIMEOUT_S))


class _Redirects(HTTPRedirectHandler):
    """Follows to where a web address may lead, and says when that is another host."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise URLError(f"redirected from {old.scheme} to {new.scheme}")
        if old.hostname != new.hostname:
            _logger.warning("%s: redirected to another host, %s", req.full_url, new.hostname)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _verify(file: IO[bytes], what: str, expected: str | None) -> str:
    """Return the SHA-256 of a file, which has to be the expected one if that is known."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    found = digest.hexdigest()
    if expected is not None and found != expected:
        raise InputError(
            f"{what}: its sha256 is {found}, expected {expected}; download it again (remove it "
            "first if it is here), or give the right checksum."
        )
    return found
