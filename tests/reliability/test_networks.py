"""R15: two hosts, each a network namespace, whose link breaks."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.runs import Run, Strike, assert_same_run, find_orphans, run, start

pytestmark = pytest.mark.slow

_TIMEOUT_S = 12
_NEW_NETWORK = 0x40000000


class Hosts:
    """Two network namespaces with a link between them."""

    def __init__(self) -> None:
        self.names = [f"ecoformer{os.getpid()}n{number}" for number in range(2)]

    def ip(self, words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)

    def open(self) -> None:
        for name in self.names:
            self.ip(f"netns add {name}")
            self.ip(f"-n {name} link set lo up")
        one, other = self.names
        self.ip(f"-n {one} link add link0 type veth peer name link0 netns {other}")
        for number, name in enumerate(self.names):
            self.ip(f"-n {name} addr add 10.77.0.{number + 1}/24 dev link0")
            self.ip(f"-n {name} link set link0 up")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def set_link(self, state: str) -> None:
        self.ip(f"-n {self.names[0]} link set link0 {state}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if not shutil.which("ip"):
        pytest.skip("there is no ip command to make network namespaces with")
    found = Hosts()
    try:
        found.open()
    except subprocess.CalledProcessError as error:
        found.close()
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    yield found
    found.close()


def enter(rank: int, *, names: list[str], strike: Strike) -> None:
    """Move a rank to its host, and have it stop its step for a moment in which the link breaks."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", names[rank]).open() as namespace:
        assert libc.setns(namespace.fileno(), _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
    os.environ["MASTER_ADDR"] = "10.77.0.1"
    os.environ["GLOO_SOCKET_IFNAME"] = "link0"
    strike(rank)


def begin(flags: list[str], folder: Path, hosts: Hosts, strike: Strike) -> Run:
    flags = [*flags, "--dist-timeout", str(_TIMEOUT_S / 60)]
    hook = functools.partial(enter, names=hosts.names, strike=strike)
    return start(flags, folder, world_size=2, hook=hook)


def wait_for_strike(found: Run) -> int:
    end = time.monotonic() + 60
    while "struck at" not in found.said():
        assert time.monotonic() < end, found.said()
        time.sleep(0.02)
    time.sleep(0.2)
    [pid] = [
        process.pid
        for number, process in enumerate(found.processes)
        if "struck at" in (found.folder / f"said.{number}").read_text()
    ]
    assert pid is not None
    return pid


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["step", "evaluation", "write", "fit"])
def test_a_link_cut_for_good(
    phase: str, rank: int, hosts: Hosts, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    if phase in ("write", "fit") and rank:
        pytest.skip("rank 0 alone does that")
    found = begin(pair_flags, tmp_path, hosts, Strike(phase, 3, signal.SIGSTOP, rank=rank))
    pid = wait_for_strike(found)
    hosts.set_link("down")
    os.kill(pid, signal.SIGCONT)
    began = time.monotonic()
    codes = found.wait(_TIMEOUT_S + 60)
    print(f"{phase}, rank {rank}: gone after {time.monotonic() - began:.0f} s, {codes}")
    assert codes == [1, 1], found.said()
    assert found.said().count("error: ") in (1, 2)
    for number in range(2):
        assert (tmp_path / f"said.{number}").read_text().count("error: ") <= 1
    assert "Traceback" not in found.said()
    assert found.orphans() == []
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)


def test_a_link_cut_for_a_while(
    hosts: Hosts, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    found = begin(pair_flags, tmp_path, hosts, Strike("step", 4, signal.SIGSTOP, rank=1))
    pid = wait_for_strike(found)
    hosts.set_link("down")
    os.kill(pid, signal.SIGCONT)
    time.sleep(3)
    hosts.set_link("up")
    codes = found.wait(_TIMEOUT_S + 60)
    assert codes in ([0, 0], [1, 1]), found.said()
    assert find_orphans([process.pid for process in found.processes]) == []
    if codes == [1, 1]:
        run(pair_flags, tmp_path, world_size=2)
        assert_same_run(found, whole_pair)
    else:
        lines = [(one / "log.txt").read_text() for one in (found.folder, whole_pair.folder)]
        assert lines[0] == lines[1]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_host_killed(
    killed: int, hosts: Hosts, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    """It takes its end of the link with it, so that nobody hears of its end."""
    found = begin(pair_flags, tmp_path, hosts, Strike("step", 4, signal.SIGSTOP, rank=killed))
    wait_for_strike(found)
    hosts.set_link("down")
    found.processes[killed].kill()
    codes = found.wait(_TIMEOUT_S + 60)
    assert codes[killed] == -9
    assert codes[1 - killed] == 1, found.said()
    assert "Traceback" not in found.said()
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)
