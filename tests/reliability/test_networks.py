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
from typing import Any

import pytest

from tests.engine.ranks import warm_context
from tests.reliability.runs import LAST, Run, Strike, assert_same_run, find_orphans, run, start
from tests.reliability.torchruns import (
    become_torchrun,
    launch,
    list_sessions,
    wait_for_strike,
)

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
    move_to(names[rank])
    os.environ["MASTER_ADDR"] = "10.77.0.1"
    strike(rank)


def move_to(name: str) -> None:
    """Move this process to a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open() as namespace:
        assert libc.setns(namespace.fileno(), _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
    os.environ["GLOO_SOCKET_IFNAME"] = "link0"


def begin(flags: list[str], folder: Path, hosts: Hosts, strike: Strike) -> Run:
    flags = [*flags, "--dist-timeout", str(_TIMEOUT_S / 60)]
    hook = functools.partial(enter, names=hosts.names, strike=strike)
    return start(flags, folder, world_size=2, hook=hook)


def wait_for_strike_of(found: Run) -> int:
    """Which rank's process it was."""
    wait_for_strike(found)
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
    pid = wait_for_strike_of(found)
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


def assert_all_told(found: Run) -> None:
    assert found.wait(_TIMEOUT_S + 60) == [1, 1], found.said()
    for number in range(2):
        said = (found.folder / f"said.{number}").read_text()
        assert said.count("error: ") == 1
        assert "--dist-timeout 0.2" in said
    assert "Traceback" not in found.said()
    assert found.orphans() == []


def test_a_link_that_is_dead_from_the_start(
    hosts: Hosts, pair_flags: list[str], tmp_path: Path
) -> None:
    hosts.set_link("down")
    assert_all_told(begin(pair_flags, tmp_path, hosts, Strike("step", 0, signal.SIGCONT)))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_link_cut_while_ranks_meet(
    rank: int, hosts: Hosts, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    found = begin(pair_flags, tmp_path, hosts, Strike("meeting", 0, signal.SIGSTOP, rank=rank))
    pid = wait_for_strike_of(found)
    hosts.set_link("down")
    os.kill(pid, signal.SIGCONT)
    assert_all_told(found)
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)


def download_slowly(rank: int, *, names: list[str], strike: Strike) -> None:
    """Longer than ranks wait for each other."""
    from ecoformer.engine import sources

    real = sources.resolve_source

    def resolve(source: str) -> Path:
        if rank == 0:
            strike.hit(0)
            time.sleep(1.5 * _TIMEOUT_S)
        return real(source)

    sources.resolve_source = resolve  # type: ignore[assignment]
    enter(rank, names=names, strike=Strike("step", 100, signal.SIGCONT))


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_link_cut_in_a_download(
    is_cut: bool, hosts: Hosts, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    strike = Strike("download", 0, signal.SIGCONT)
    flags = [*pair_flags, "--dist-timeout", str(_TIMEOUT_S / 60)]
    found = start(
        [*flags, "--resume", str(whole_pair.folder / LAST)],
        tmp_path,
        world_size=2,
        hook=functools.partial(download_slowly, names=hosts.names, strike=strike),
    )
    wait_for_strike(found)
    if not is_cut:
        assert found.wait(_TIMEOUT_S + 60) == [0, 0], found.said()
        return
    hosts.set_link("down")
    assert_all_told(found)


def test_a_link_cut_for_a_while(
    hosts: Hosts, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    found = begin(pair_flags, tmp_path, hosts, Strike("step", 4, signal.SIGSTOP, rank=1))
    pid = wait_for_strike_of(found)
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


def launch_on_host(
    number: int, name: str, flags: list[str], said: Path, strike: Strike, **options: Any
) -> None:
    move_to(name)
    launch(flags, said, strike, local_addr=f"10.77.0.{number + 1}", **options)


def start_torchruns(
    flags: list[str],
    folder: Path,
    hosts: Hosts,
    strike: Strike,
    *,
    backend: str,
    max_restarts: int,
) -> Run:
    """One on each host, with a rank each."""
    flags = [*flags, "--output_dir", str(folder), "--dist-timeout", str(_TIMEOUT_S / 60)]
    processes = []
    for number, name in enumerate(hosts.names):
        options = {
            **{"min_nodes": 2, "max_nodes": 2, "nproc_per_node": 1, "max_restarts": max_restarts},
            **{"rdzv_backend": backend, "rdzv_endpoint": "10.77.0.1:29577", "run_id": "hosts"},
            "rdzv_configs": {"rank": number} if backend == "static" else {"is_host": not number},
        }
        arguments = (number, name, flags, folder / f"said.{number}", strike)
        process = warm_context().Process(target=launch_on_host, args=arguments, kwargs=options)
        process.start()
        processes.append(process)
    return Run(folder, processes)


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_torchruns_on_two_hosts_restart(
    backend: str,
    killed: int,
    hosts: Hosts,
    pair_flags: list[str],
    whole_pair: Run,
    tmp_path: Path,
) -> None:
    strike = Strike("step", 4, signal.SIGKILL, rank=killed)
    found = start_torchruns(pair_flags, tmp_path, hosts, strike, backend=backend, max_restarts=3)
    assert found.wait(120) == [0, 0], found.said()
    assert len(list_sessions(tmp_path)) == 4
    assert find_orphans(list_sessions(tmp_path)) == []
    assert_same_run(found, whole_pair)


def become_torchrun_on_host(
    number: int,
    name: str,
    backend: str,
    max_restarts: int,
    flags: list[str],
    said: Path,
    strike: Strike,
) -> None:
    move_to(name)
    words = ["--nnodes=2", "--nproc-per-node=1", f"--max-restarts={max_restarts}"]
    words += [f"--rdzv-backend={backend}", "--rdzv-endpoint=10.77.0.1:29577", "--rdzv-id=hosts"]
    words += [f"--local-addr=10.77.0.{number + 1}", f"--node-rank={number}"]
    if backend == "c10d":
        words += [f"--rdzv-conf=is_host={not number}"]
    become_torchrun(words, flags, said, strike)


def cut_under_torchruns(
    flags: list[str], folder: Path, hosts: Hosts, *, backend: str, max_restarts: int
) -> Run:
    """Start the command ``torchrun`` on each host, and cut the link in a step."""
    flags = [*flags, "--output_dir", str(folder), "--dist-timeout", str(_TIMEOUT_S / 60)]
    strike = Strike("step", 4, signal.SIGSTOP, rank=1)
    processes = []
    for number, name in enumerate(hosts.names):
        said = folder / f"said.{number}"
        arguments = (number, name, backend, max_restarts, flags, said, strike)
        process = warm_context().Process(target=become_torchrun_on_host, args=arguments)
        process.start()
        processes.append(process)
    found = Run(folder, processes)
    wait_for_strike(found)
    hosts.set_link("down")
    for session in list_sessions(folder):
        os.kill(session, signal.SIGCONT)
    return found


@pytest.mark.parametrize("max_restarts", [0, 1])
@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_torchruns_end_whose_link_is_cut(
    backend: str,
    max_restarts: int,
    hosts: Hosts,
    pair_flags: list[str],
    whole_pair: Run,
    tmp_path: Path,
) -> None:
    found = cut_under_torchruns(
        pair_flags, tmp_path, hosts, backend=backend, max_restarts=max_restarts
    )
    began = time.monotonic()
    sessions = list_sessions(tmp_path)
    assert find_orphans(sessions, _TIMEOUT_S + 60) == []
    ranks_gone = time.monotonic() - began
    # A restart is another start, which may wait as long; static rendezvous makes it alone.
    limit_s = (1 + max_restarts) * (_TIMEOUT_S + 60)
    codes = found.wait(began + limit_s - time.monotonic())
    print(
        f"{backend}, {max_restarts} restarts: ranks gone after {ranks_gone:.0f} s, "
        f"torchruns after {time.monotonic() - began:.0f} s, {codes}"
    )
    assert None not in codes and 0 not in codes, found.said()
    assert found.orphans() == []
    for number in range(2):
        said = (tmp_path / f"said.{number}").read_text()
        assert said.count("error: ") <= 1 + max_restarts
    assert "error: " in found.said()
    assert_same_run(run(pair_flags, tmp_path, world_size=2), whole_pair)


@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_torchruns_restart_whose_link_is_healed(
    backend: str, hosts: Hosts, pair_flags: list[str], whole_pair: Run, tmp_path: Path
) -> None:
    """Those that were about to be ended start their ranks, and are left alone."""
    found = cut_under_torchruns(pair_flags, tmp_path, hosts, backend=backend, max_restarts=3)
    assert find_orphans(list_sessions(tmp_path), _TIMEOUT_S + 60) == []
    hosts.set_link("up")
    assert found.wait(120) == [0, 0], found.said()
    assert_same_run(found, whole_pair)


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
