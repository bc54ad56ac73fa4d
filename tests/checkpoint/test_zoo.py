"""Zoo names and URLs: what enters the cache, and what does not."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request

import pytest
import torch

import pvt
import twins
from ecoformer.checkpoint import resolve_source, zoo
from ecoformer.errors import InputError
from tests.privileges import without_privileges


def to_bytes(name: str) -> bytes:
    """A weight file of one entry."""
    buffer = io.BytesIO()
    torch.save({name: torch.arange(5000.0)}, buffer)
    return buffer.getvalue()


GOOD, OLD = to_bytes("w"), to_bytes("v")
SHA256 = hashlib.sha256(GOOD).hexdigest()
FLIPPED = bytes([*GOOD[:9000], GOOD[9000] ^ 1, *GOOD[9001:]])
PAGE = b"<!DOCTYPE html><html>Please sign in</html>"
# Path -> what is sent, and the length that is claimed.
PAGES: dict[str, tuple[bytes, object]] = {
    "/good.pth": (GOOD, len(GOOD)),
    "/old/good.pth": (OLD, len(OLD)),
    "/flipped.pth": (FLIPPED, len(GOOD)),
    "/cut.pth": (GOOD[:9000], len(GOOD)),
    "/cut-at-the-end.pth": (GOOD, len(GOOD) + 1),
    "/huge.pth": (GOOD, 2**60),
    "/no-length.pth": (GOOD, "many"),
    "/login": (PAGE, len(PAGE)),
}


REDIRECTS = {
    "/redirect.pth": "/login",
    "/to-ftp.pth": "ftp://127.0.0.1/good.pth",
    "/to-file.pth": "file:///etc/passwd",
    "/for-ever.pth": "/for-ever.pth",
}
# How long a test's server goes on where it would never stop.
FOR_EVER_S = 5.0


class Handler(BaseHTTPRequestHandler):
    """Serves the pages above, redirects, pages without end, and nothing else."""

    def do_GET(self) -> None:
        """Answer one request."""
        with contextlib.suppress(ConnectionError):
            self.answer()

    def answer(self) -> None:
        """Send what the path asks for."""
        _, port = self.connection.getsockname()
        if self.path in {**REDIRECTS, "/other-host.pth": None}:
            self.send_response(302)
            other = f"http://localhost:{port}/good.pth"
            self.send_header("Location", REDIRECTS.get(self.path, other))
            self.end_headers()
            return
        end = time.monotonic() + FOR_EVER_S
        if self.path == "/slow-answer.pth":
            self.wfile.write(b"HTTP/1.0 200 ")
            while time.monotonic() < end:
                self.wfile.write(b"x")
                time.sleep(0.02)
            return
        if self.path in ("/slow.pth", "/endless.pth"):
            self.send_response(200)
            self.end_headers()
            is_slow = self.path == "/slow.pth"
            while time.monotonic() < end:
                self.wfile.write(b"x" if is_slow else bytes(65536))
                time.sleep(0.02 if is_slow else 0)
            return
        if self.path not in PAGES:
            self.send_error(404)
            return
        content, length = PAGES[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, as torch.hub has it; no proxy stands before the server."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_download_is_kept_and_used_again(server: str, cache: Path) -> None:
    path = resolve_source(f"{server}/good.pth#sha256={SHA256}")
    assert path.read_bytes() == GOOD
    assert list(cache.iterdir()) == [path]
    stamp = path.stat().st_mtime_ns
    assert resolve_source(f"{server}/good.pth#sha256={SHA256}") == path
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", ["flipped.pth", "cut.pth", "redirect.pth"])
def test_wrong_content_is_refused_with_both_checksums(name: str, server: str, cache: Path) -> None:
    url = f"{server}/{name}"
    with pytest.raises(InputError) as caught:
        resolve_source(f"{url}#sha256={SHA256}")
    message = str(caught.value)
    assert message.startswith(url)
    assert "\n" not in message
    assert len(set(re.findall(r"[0-9a-f]{64}", message)) | {SHA256}) == 2
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut.pth", "damaged, cut short"),
        ("cut-at-the-end.pth", f"{len(GOOD)} of {len(GOOD) + 1} bytes came"),
        ("redirect.pth", "a web page"),
        ("absent.pth", "404"),
        ("to-ftp.pth", "redirected from http to ftp"),
        ("to-file.pth", "not allowed"),
        ("for-ever.pth", "infinite loop"),
        ("huge.pth", "bytes, more than"),
        ("no-length.pth", "invalid literal"),
        ("slow.pth", r"too slow, \d+ bytes in 1 s"),
        ("slow-answer.pth", "no answer in 1 s"),
        ("endless.pth", "no end after 1000000 bytes"),
    ],
)
def test_what_needs_no_checksum_to_be_refused(
    name: str, reason: str, server: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "_PATIENCE_S", 1.0)
    monkeypatch.setattr(zoo, "_MAX_BYTES", 1_000_000)
    began = time.monotonic()
    with pytest.raises(InputError, match=reason) as caught:
        resolve_source(f"{server}/{name}")
    assert time.monotonic() - began < FOR_EVER_S - 1
    message = str(caught.value)
    assert message.startswith(f"{server}/{name}: ")
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_a_redirect_to_another_host_is_said(
    server: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with caplog.at_level(logging.WARNING):
        assert resolve_source(f"{server}/other-host.pth").read_bytes() == GOOD
    assert f"{server}/other-host.pth: redirected to another host, localhost" in caplog.text
    assert "another host" not in str(resolve_source(f"{server}/good.pth"))


def test_a_redirect_does_not_leave_https() -> None:
    request = Request("https://127.0.0.1/good.pth")
    for url in ("http://127.0.0.1/good.pth", "ftp://127.0.0.1/good.pth"):
        with pytest.raises(URLError, match="redirected from https"):
            zoo._Redirects().redirect_request(request, io.BytesIO(), 302, "Found", {}, url)


@pytest.mark.parametrize(
    "fragment",
    [
        *("", "sha256", "sha256=", f"sha256={SHA256[:-1]}", f"sha256={SHA256}0"),
        *(f"sha256={'g' * 64}", f"sha256={SHA256}#", f"sha256 ={SHA256}", f"md5={SHA256}"),
    ],
)
def test_a_checksum_that_is_none_is_refused(fragment: str, server: str, cache: Path) -> None:
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        resolve_source(f"{server}/good.pth#{fragment}")
    assert list(cache.iterdir()) == []


def test_a_checksum_may_be_in_capitals(server: str, cache: Path) -> None:
    for mark in (f"sha256={SHA256.upper()}", f"SHA256={SHA256}"):
        assert resolve_source(f"{server}/good.pth#{mark}").read_bytes() == GOOD
        with pytest.raises(InputError, match="its sha256 is"):
            resolve_source(f"{server}/flipped.pth#{mark}")


def test_without_a_network_the_message_tells_where_to_put_the_file(
    cache: Path,
) -> None:
    with pytest.raises(InputError, match="put it at") as caught:
        resolve_source("http://127.0.0.1:1/weights.pth")
    assert "\n" not in str(caught.value)
    place = Path(re.findall(r"put it at (.*)\.$", str(caught.value))[0])
    place.write_bytes(GOOD)
    assert resolve_source("http://127.0.0.1:1/weights.pth") == place


def test_two_processes_at_once_leave_one_whole_file(server: str, cache: Path) -> None:
    url = f"{server}/good.pth#sha256={SHA256}"
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        paths = list(pool.map(resolve_source, [url] * 2))
    assert set(paths) == set(cache.iterdir())
    assert paths[0].read_bytes() == GOOD


def test_what_a_killed_download_left_is_removed_by_the_next(server: str, cache: Path) -> None:
    path = resolve_source(f"{server}/good.pth")
    path.unlink()
    dead, alive = (cache / f".{path.name}.{number}.tmp" for number in (1, 2))
    for half in (dead, alive):
        half.write_bytes(GOOD[:100])
    long_ago = time.time() - 3600
    os.utime(dead, (long_ago, long_ago))
    assert resolve_source(f"{server}/good.pth") == path
    assert set(cache.iterdir()) == {path, alive}


def test_files_of_one_name_from_two_places_are_two(server: str, cache: Path) -> None:
    paths = [resolve_source(f"{server}{page}") for page in ("/good.pth", "/old/good.pth")]
    assert [path.read_bytes() for path in paths] == [GOOD, OLD]


def test_zoo_name_takes_its_file_and_says_that_it_is_unverified(
    server: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = replace(zoo.ZOO["ecoformer_pvt_v2_b0"], url=f"{server}/good.pth")
    monkeypatch.setitem(zoo.ZOO, "ecoformer_pvt_v2_b0", entry)
    with caplog.at_level(logging.WARNING):
        path = resolve_source("ecoformer_pvt_v2_b0")
    assert path == cache / "good.pth"
    assert SHA256 in caplog.text
    assert "not verified" in caplog.text

    caplog.clear()
    monkeypatch.setitem(zoo.ZOO, "ecoformer_pvt_v2_b0", replace(entry, sha256=SHA256))
    assert resolve_source("ecoformer_pvt_v2_b0") == path
    assert caplog.text == ""

    path.write_bytes(FLIPPED)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*expected {SHA256}"):
        resolve_source("ecoformer_pvt_v2_b0")


def test_a_url_of_the_zoo_is_the_same_file_as_its_name(cache: Path, tmp_path: Path) -> None:
    url = zoo.ZOO["ecoformer_pvt_v2_b0"].url
    for folder, given in ((cache, None), (tmp_path / "mine", tmp_path / "mine")):
        folder.mkdir(exist_ok=True)
        path = folder / "pvtv2_b0_ecoformer.pth"
        path.write_bytes(GOOD)
        for source in ("ecoformer_pvt_v2_b0", url, f"{url}#sha256={SHA256}"):
            assert resolve_source(source, given) == path
        with pytest.raises(InputError, match="sha256"):
            resolve_source(f"{url}#sha256={'0' * 64}", given)


@pytest.mark.parametrize("url", ["file:///weights.pth", "ftp://example.org/weights.pth"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(InputError, match=f"{url}: .* by its path"):
        resolve_source(url)


@pytest.mark.parametrize("source", ["http://[bad/x.pth", "~no-such-user/x.pth"])
def test_addresses_and_homes_that_cannot_be(source: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(source)}: cannot be had"):
        resolve_source(source)


@pytest.mark.parametrize("kind", ["folder", "unreadable"])
def test_a_cached_file_that_cannot_be_read(kind: str, cache: Path) -> None:
    path = cache / "pvtv2_b0_ecoformer.pth"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(GOOD)
        path.chmod(0)
    with without_privileges(), pytest.raises(InputError, match=f"cannot be had .*{path.name}"):
        resolve_source("ecoformer_pvt_v2_b0")


def test_unknown_zoo_name_shows_the_nearest(cache: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'ecoformer_twins_svt_small'"):
        resolve_source("ecoformer_twins_svt_smal")


def test_paths_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ecoformer_pvt_v2_b0").touch()
    for path in ("a.pth", "runs/last", str(tmp_path / "b"), "ecoformer_pvt_v2_b0"):
        assert resolve_source(path) == Path(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/a.pth") == tmp_path / "a.pth"


def test_the_readme_lists_the_zoo() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name, entry in zoo.ZOO.items():
        cells = (
            *(f"`{name}`", f"`{entry.model}`", entry.top1, entry.mul_g, entry.add_g),
            *(entry.energy_g_pj, entry.throughput_img_s),
        )
        assert f"| {' | '.join(map(str, cells))} |" in readme


def test_zoo_holds_the_published_table_under_timm_names(golden_dir: Path) -> None:
    table = json.loads((golden_dir / "published_table.json").read_text())
    assert {entry.model for entry in zoo.ZOO.values()} == table.keys()
    timm_names = {**pvt.FAMILY.timm_names, **twins.FAMILY.timm_names}
    for name, entry in zoo.ZOO.items():
        assert timm_names[name] == entry.model
        assert {field: getattr(entry, field) for field in table[entry.model]} == table[entry.model]
