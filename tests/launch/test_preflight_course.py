"""The course of a preflight: ranks as threads, each with its fault; the real thing runs in tests/slurm."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.cluster import preflight
from launch.cluster.node_checks import Findings
from launch.cluster.node_judgement import Course
from launch.cluster.notes import bad_nodes, leave_word
from scldm.errors import InputError

pytestmark = pytest.mark.heavy

STORES = []  # a thread that hung may still ask one for a word


class Ranks:
    """Six nodes of one rank, as threads of this process; `faults`: stage -> rank -> what happens there."""

    def __init__(self, notes: Path) -> None:
        self.use, self.note = [], ""
        self.course = Course([f"n{k}" for k in range(6)], 1, notes, time.monotonic())
        self.faults: dict[str, dict[int, Callable[[], None]]] = {"findings": {}, "product": {}, "pair": {}}
        self.absent: set[int] = set()
        self.refused: dict[int, Exception] = {}
        self.released, self.dead = threading.Event(), set[int]()

    def hang(self) -> None:
        self.released.wait(30)

    def at(self, stage: str, rank: int) -> None:
        self.faults[stage].get(rank, lambda: None)()

    def findings(self, config: object, notes: Path, node: str, local: int, tell: Callable[[str], None]) -> Findings:
        tell("looks at its folders")
        leave_word(notes, node)
        self.at("findings", local)
        return Findings([], [], {"numpy": "2.4"}, [], 1.0)

    def product(self, rank: int) -> float:
        self.at("product", rank)
        return 0.1

    def all_reduce(self, rank: int, store: object, place: int, size: int) -> float:
        """Two that both come are done; where one does not, the other waits."""
        self.at("pair", rank)
        store.add("here", 1)  # pyright: ignore[reportAttributeAccessIssue]
        while store.add("here", 0) < size:  # pyright: ignore[reportAttributeAccessIssue]
            if self.released.wait(0.02):
                break
        return 0.01

    def beat(self, course: Course, rank: int, done: threading.Event) -> None:
        store = preflight.store_of_job()
        while rank not in self.dead and not self.released.wait(0.05):
            store.add(f"beats/{rank}", 1)

    def run(self) -> dict[str, list[str]]:
        store = preflight.store_of_job(serves=True)
        STORES.append(store)
        self.course = replace(self.course, began=time.monotonic())
        for rank in set(range(6)) - self.absent:
            args = (self.course, self.refused.get(rank, SimpleNamespace()), rank, rank)
            threading.Thread(target=preflight.take_part, args=args, daemon=True).start()
        preflight.lead(self.course, self.refused.get(0, SimpleNamespace()), store)
        report = json.loads((self.course.notes / "preflight.json").read_text())
        self.use, self.note = report["use"], report["note"]
        self.released.set()
        return {row["node"]: row["troubles"] for row in report["nodes"] if row["troubles"]}


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    found = Ranks(tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("SCLDM_MIN_NODES", "1")
    monkeypatch.setenv("SCLDM_PREFLIGHT_S", "55")
    times = {"JOIN": 10.0 / 55, "PRODUCT_S": 2.0, "PAIR_S": 1.5, "LEAST_PAIR_S": 0.5, "BEAT_S": 0.1}
    for name, value in times.items():
        monkeypatch.setattr(preflight, name, value)
    monkeypatch.setattr(preflight, "findings_of", found.findings)
    monkeypatch.setattr(preflight, "device_of", lambda local: local)
    monkeypatch.setattr(preflight, "time_matmul", found.product)
    monkeypatch.setattr(preflight, "time_all_reduce", found.all_reduce)
    monkeypatch.setattr(preflight, "_beat", found.beat)
    yield found
    found.released.set()


def fails() -> None:
    raise OSError("no room")


def test_a_port_that_is_taken_is_no_nodes_fault(tmp_path: Path) -> None:
    """The first rank as its own process."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SCLDM_HOSTS": "n1 n2", "SCLDM_NOTES": str(tmp_path)}
        env |= {
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_LOCALID": "0",
            "SLURM_JOB_ID": "7",
            "SCLDM_PREFLIGHT_S": "55",
        }
        words = [sys.executable, "-m", "launch.cluster.preflight", "encode", "vae=a", "shards=b", "out=c"]
        done = subprocess.run(words, env=os.environ | env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert bad_nodes(tmp_path) == {}
    assert (tmp_path / "preflight.json").exists(), done.stderr
    use, note = map(json.loads((tmp_path / "preflight.json").read_text()).get, ("use", "note"))
    assert use == []
    assert note.startswith(f"port {port} of n1 can't be served. Where another program has it, submit again")


def test_six_sound_nodes_run(ranks: Ranks) -> None:
    assert ranks.run() == {}
    assert (ranks.use, ranks.note) == (ranks.course.hosts, "")


def test_words_that_all_ranks_refuse_end_the_job(ranks: Ranks) -> None:
    ranks.refused = dict.fromkeys(range(6), InputError("unknown key 'data.x'"))
    assert ranks.run() == {}
    assert (ranks.use, ranks.note) == ([], "every rank failed: InputError: unknown key 'data.x'")


def test_each_rank_that_gives_no_result_is_named_with_what_it_did_and_no_other(ranks: Ranks) -> None:
    """One never came up, one hangs over its folders; the first one, which leads, hangs in its product; the code of one
    refuses the words."""
    ranks.absent = {1}
    ranks.refused = {5: InputError("unknown key 'data.x'")}
    ranks.faults = {"findings": {2: ranks.hang}, "product": {0: ranks.hang}, "pair": {}}
    told = ranks.run()
    assert told == {
        "n0": ["rank 0 hangs: it computes a matrix product"],
        "n1": ["rank 1 did not come up in time. --preflight-s gives more"],
        "n2": ["rank 2 hangs: it looks at its folders"],
        "n5": ["rank 5 failed: InputError: unknown key 'data.x'"],
    }
    assert ranks.use == ["n3", "n4"]


RUBBISH = [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"5", "it is 5, must be a mapping"),
    (b"{}", "it is a NoneType, must be a mapping"),
    (b'{"failed": 5}', "failed: it is 5, must be text"),
    (b'{"is": {"gpu": [], "broken": 3}}', "broken is 3, must be a list"),
    (b'{"is": {"gpu": [], "broken": [], "disk_gb": NaN}}', "disk_gb is nan, must be a finite number"),
]


@pytest.mark.parametrize("value, said", RUBBISH)
def test_what_no_rank_would_write_is_held_against_its_node_in_words(ranks: Ranks, value: bytes, said: str) -> None:
    store = preflight.store_of_job(serves=True)
    for rank in (0, 1):
        store.set(f"findings/{rank}", json.dumps({"is": {"gpu": [], "broken": []}}) if rank else value)
    found, missing = preflight.collect(store, "findings", Findings, [0, 1], time.monotonic() + 5)
    assert found == {1: Findings([], [])}
    assert missing[0].startswith("gave what is no result: preflight: findings/0")
    assert said in missing[0]


@pytest.mark.parametrize("key, value", [("product", b"{"), ("ring", b"3"), ("round/0", b"NaN"), ("round/0", b'"x"')])
def test_a_rank_ends_in_words_where_the_first_ones_are_rubbish(
    ranks: Ranks, capsys: pytest.CaptureFixture, key: str, value: bytes
) -> None:
    store = preflight.store_of_job(serves=True)
    STORES.append(store)
    for name, word in {"product": "[]", "ring": '["n0", "n1"]', key: value}.items():
        store.set(name, word)
    assert preflight.take_part(ranks.course, SimpleNamespace(), 1, 1) == 3
    said = capsys.readouterr().out
    assert said.startswith(f"preflight: rank 1 on n1 ends: preflight: {key} of the first rank, on n0")
    assert said.count("\n") == 1


def test_a_rank_that_hangs_or_died_in_an_all_reduce_is_named_and_its_neighbours_are_not(ranks: Ranks) -> None:
    ranks.faults = {"findings": {4: fails}, "product": {}, "pair": {2: ranks.hang}}
    told = ranks.run()
    assert told.pop("n4") == ["rank 4 failed: OSError: no room"]
    for why in told.pop("n2"):
        assert why.startswith("an all-reduce of n")
        assert "does not end: rank 2 hangs: it takes part in an all-reduce of n" in why
    assert told == {}
    assert ranks.use == ["n0", "n1", "n3", "n5"]


@pytest.mark.slow
def test_a_rank_without_a_heart_beat_died(ranks: Ranks) -> None:
    ranks.dead = {3}
    ranks.faults = {"findings": {}, "product": {}, "pair": {3: ranks.hang}}
    told = ranks.run()
    assert list(told) == ["n3"]
    assert all(why.startswith("rank 3 died or froze: it takes part in an all-reduce of n") for why in told["n3"])
    assert ranks.use == ["n0", "n1", "n2", "n4", "n5"]
