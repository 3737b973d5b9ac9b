"""Two real ranks that watch each other: who says what, with which exit code, and how soon. More faults, met while two
ranks train, are in tests/launch/test_faults.py."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]


class Ranks:
    """Two processes; the output of both in files."""

    def __init__(self, folder: Path, meets: str, address: str = "127.0.0.1", prefixes: tuple = ((), ())) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        self.paths = [folder / f"{rank}.txt" for rank in (0, 1)]
        self.processes = []
        for rank, (path, prefix) in enumerate(zip(self.paths, prefixes)):
            env = {**os.environ, **place, "RANK": str(rank), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [*prefix, sys.executable, "-m", "tests.scldm.parallel.two_ranks", *meets.split()]
            with path.open("w") as out:
                self.processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=ROOT))
        self.wait_for(lambda: all("watches" in path.read_text() for path in self.paths), 100)

    def wait_for(self, true: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)

    def codes(self, seconds: float, ranks: tuple[int, ...] = (0, 1)) -> list[int]:
        return [self.processes[rank].wait(seconds) for rank in ranks]

    def said(self) -> list[str]:
        return [path.read_text() for path in self.paths]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def test_two_ranks_meet_among_strangers(tmp_path: Path) -> None:
    with Ranks(tmp_path, "strangers") as ranks:
        assert ranks.codes(30) == [0, 0]
        assert all("ends as it should" in said for said in ranks.said())


def test_a_stuck_interpreter_is_named_and_ends_with_its_stacks(tmp_path: Path) -> None:
    with Ranks(tmp_path, "an interpreter that is stuck") as ranks:
        assert ranks.codes(30) == [87, 1]
        said = ranks.said()
        assert "rank 1 (" in said[0]
        assert "hangs: it does not answer" in said[0]
        assert "Timeout (" in said[1]
        assert "two_ranks.py" in said[1]


def test_a_frozen_first_rank_is_named_by_the_others(tmp_path: Path) -> None:
    with Ranks(tmp_path, "a signal") as ranks:
        ranks.processes[0].send_signal(signal.SIGSTOP)
        assert ranks.codes(30, (1,)) == [87]
        assert "stops: rank 0 (" in ranks.said()[1]
        assert "hangs: it does not ask why nothing goes on" in ranks.said()[1]


def test_a_process_that_failed_ends_although_something_keeps_it(tmp_path: Path) -> None:
    with Ranks(tmp_path, "an end that never comes") as ranks:
        assert ranks.codes(30) == [1, 1]
        assert "failed: ValueError: in vain" in ranks.said()[0]


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.213.0.1 and 10.213.0.2."""
    names = tuple(f"scldm-{uuid.uuid4().hex[:6]}" for _ in range(2))
    with ExitStack() as undo:

        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

        try:
            for name in names:
                ip("netns", "add", name)
                undo.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for k, name in enumerate(names):
                ip("-n", name, "address", "add", f"10.213.0.{k + 1}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a host that vanishes takes the right to make network namespaces: {error}")
        yield names[0], names[1]


def test_a_host_that_vanishes_is_named_within_45_s(tmp_path: Path, hosts: tuple[str, str]) -> None:
    """Its connections are not closed: nothing comes from it any more."""
    within = tuple(("ip", "netns", "exec", host, "env", "GLOO_SOCKET_IFNAME=cable") for host in hosts)
    with Ranks(tmp_path, "an end of its host", "10.213.0.1", within) as ranks:
        subprocess.run(["ip", "-n", hosts[1], "link", "set", "cable", "down"], check=True)
        began = time.monotonic()
        assert ranks.codes(60) == [87, 87]
        assert time.monotonic() - began < 45
        for rank, other in ((0, 1), (1, 0)):
            assert f"rank {rank} stops: rank {other} (" in ranks.said()[rank]
            assert "is gone: its connection ended" in ranks.said()[rank]
