"""What preflight concludes from findings and timings, and the staging of shards; the real thing runs in tests/slurm."""

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

from launch import node_checks, node_judgement, node_tokens, preflight_stages, stage
from launch.job import bad_nodes
from launch.node_checks import Findings
from launch.node_judgement import Course, Report, nodes_to_use
from scldm.errors import InputError
from tests.data_pipeline.small_sets import known_cells, write_set

HOSTS = ["n1", "n2", "n3", "n4"]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every node has left its token."""
    monkeypatch.setattr(node_judgement, "SEEN_S", 0.0)
    for host in HOSTS:
        node_tokens.leave(tmp_path, host)
    return tmp_path


def findings(n_ranks: int = 8) -> dict[int, Findings]:
    """Of nodes with two ranks, the first of which tells versions."""
    same = {"numpy": "2.4", "config": "abc"}
    first = [{"same": dict(same), "gpu": [], "broken": [], "folders": []} for _ in range(0, n_ranks, 2)]
    return {rank: {"same": {}, "gpu": [], "broken": []} if rank % 2 else first[rank // 2] for rank in range(n_ranks)}


def report_of(notes: Path, hosts: list[str] = HOSTS) -> Report:
    return Report(Course(hosts, 2, notes, time.monotonic()))


def troubles_of(report: Report) -> dict[str, list[str]]:
    return {node: reasons for node, reasons in report.troubles.items() if reasons}


def judged(found: dict[int, Findings], notes: Path, hosts: list[str] = HOSTS) -> dict[str, list[str]]:
    report = report_of(notes, hosts)
    report.findings(found)
    return troubles_of(report)


def test_equal_nodes_are_fit(notes: Path) -> None:
    assert judged(findings(), notes) == {}


def test_the_odd_one_out_is_named_and_of_two_the_one_that_is_not_first(notes: Path) -> None:
    found = findings()
    found[0]["same"]["numpy"] = "1.26"
    assert judged(found, notes) == {"n1": ["numpy is 1.26, on other nodes 2.4"]}
    del found[2]["same"]["config"]
    assert judged(found, notes)["n2"] == ["config is missing, on other nodes abc"]
    found = findings(4)
    found[2]["same"]["config"] = "xyz"
    assert judged(found, notes, HOSTS[:2]) == {"n2": ["config is xyz, on other nodes abc"]}


def test_a_folder_that_is_not_shared_is_seen(notes: Path) -> None:
    (notes / "preflight" / "n2").unlink()
    (notes / "preflight" / "n4").write_text("another job's")
    assert list(judged(findings(), notes)) == ["n2", "n4"]


@pytest.mark.parametrize("hosts, blind", [(HOSTS, [2, 4, 6]), (HOSTS, [2, 4]), (HOSTS[:2], [2])])
def test_a_first_node_that_none_of_the_others_sees_is_at_fault(
    notes: Path, monkeypatch: pytest.MonkeyPatch, hosts: list[str], blind: list[int]
) -> None:
    monkeypatch.setenv("SCLDM_MIN_NODES", "1")
    report, found = report_of(notes, hosts), findings(2 * len(hosts))
    unseen = f"{notes}: {node_checks.FIRST_UNSEEN}"
    for rank in blind:
        found[rank]["folders"] = [unseen]
    report.findings(found)
    told, use = troubles_of(report), report.write(SimpleNamespace())
    if len(blind) == 3:
        assert told == {"n1": [f"{notes}: what it writes there is seen on none of the others"]}
        assert use == []  # its folder is where the job's script works
        assert report.notes == [f"{notes} is not on n1 what it is elsewhere, or is each node's own"]
    else:
        assert told == {report.course.node(rank): [unseen] for rank in blind}
        assert use == [host for host in hosts if host not in told]


def test_what_all_ranks_meet_alike_is_held_against_no_node(notes: Path) -> None:
    report = report_of(notes)
    report.failures(dict.fromkeys(range(8), "failed: KeyError: x"), range(8))
    assert troubles_of(report) == {}
    assert report.notes == ["every rank failed: KeyError: x"]
    assert report.hopeless
    report = report_of(notes)
    report.failures(dict.fromkeys(range(6), "failed: KeyError: x"), range(8))
    assert report.troubles["n1"] == ["rank 0 failed: KeyError: x", "rank 1 failed: KeyError: x"]
    assert (report.notes, report.hopeless) == ([], False)
    report = report_of(notes)  # what the first rank of each node alone does; one node never came up
    words = {
        0: "hangs: it looks at its folders",
        2: "hangs: it looks at its folders",
        4: "hangs: it looks at its folders",
    }
    report.failures(words | {6: "did not come up", 7: "did not come up"}, range(8))
    assert list(troubles_of(report)) == ["n4"]
    assert report.notes == ["on every node a rank hangs: it looks at its folders"]
    report = report_of(notes)
    report.failures(dict.fromkeys(range(8), "did not come up"), range(8))
    assert list(troubles_of(report)) == HOSTS


def test_a_mistake_in_the_job_excludes_no_node_from_the_next_submission(notes: Path) -> None:
    """A typo in data.shards is met on all nodes; what is free on their disks differs, and all of it is too little."""
    disk = [f"/disk: {k}.1 GB are free, 9.0 GB are needed" for k in range(4)]
    for words in (["typo: no shard set is seen here"] * 4, disk):
        report, found = report_of(notes), findings()
        for rank, trouble in zip((0, 2, 4, 6), words):
            found[rank]["folders"] = [trouble]
        report.findings(found)
        assert report.write(SimpleNamespace()) == []
        assert bad_nodes(notes) == {}
        assert report.notes == [f"on every node: {found[0]['folders'][0]}"]


@pytest.mark.parametrize("setting", [True, False])
def test_gpus_that_no_node_has_are_a_wrong_setting_and_memory_errors_are_not(notes: Path, setting: bool) -> None:
    for hosts in (HOSTS, HOSTS[:1]):
        report, found = report_of(notes, hosts), findings(2 * len(hosts))
        for rank in found:
            found[rank]["gpu" if setting else "broken"] = [f"{rank} GPUs are there" if setting else "GPU 0: 3 errors"]
        report.findings(found)
        assert report.hopeless == setting
        assert list(troubles_of(report)) == ([] if setting else hosts)


def test_of_a_single_node_what_some_of_its_ranks_meet_is_the_nodes_fault(notes: Path) -> None:
    report, found = report_of(notes, HOSTS[:1]), findings(2)
    found[1]["gpu"] = ["its GPU of rank 1: gone"]
    report.findings(found)
    report.failures({0: "hangs: it computes a matrix product"}, [0, 1])
    assert not report.hopeless
    assert troubles_of(report) == {"n1": ["its GPU of rank 1: gone", "rank 0 hangs: it computes a matrix product"]}
    report = report_of(notes, HOSTS[:1])
    report.failures(dict.fromkeys((0, 1), "hangs: it computes a matrix product"), [0, 1])
    assert (report.hopeless, troubles_of(report)) == (True, {})


def test_a_node_that_was_late_is_left_out_the_second_time(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCLDM_MIN_NODES", "1")
    node_tokens.leave(notes, "n2", node_tokens.BEGUN)
    for expected in ({}, {"n2": "rank 2 did not come up in time, though its node began"}):
        report = report_of(notes)
        report.findings({rank: one for rank, one in findings().items() if rank not in (2, 3)})
        report.failures({2: "did not come up"}, range(8))
        assert report.write(SimpleNamespace()) == ["n1", "n3", "n4"]
        assert {node: why.split(":")[0] for node, why in bad_nodes(notes).items()} == expected
    report = report_of(notes)
    report.failures({0: "did not come up", 6: "failed: E"}, [0, 2, 4, 6])
    report.add("n1", "slow")  # and not only late
    report.write(SimpleNamespace())
    assert list(bad_nodes(notes)) == ["n2", "n1", "n4"]
    with (notes / "bad_nodes").open("a") as file:
        file.write("n3\t2026")  # a disk that was full
    assert list(bad_nodes(notes)) == ["n2", "n1", "n4"]


@pytest.mark.parametrize("scratch", ["scratch", ""])
def test_a_nodes_own_disk_needs_room_also_where_nothing_is_staged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: str
) -> None:
    monkeypatch.setenv("SCLDM_SCRATCH", f"{tmp_path}/scratch" if scratch else "")
    monkeypatch.setattr("tempfile.tempdir", f"{tmp_path}/temporary")
    free = iter([node_checks.LEAST_DISK, node_checks.LEAST_DISK - 1])
    monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    node_tokens.leave(tmp_path, "first")
    assert node_checks.folder_troubles(SimpleNamespace(), tmp_path, "n1") == []
    (told,) = node_checks.folder_troubles(SimpleNamespace(), tmp_path, "n1")
    assert told == f"{tmp_path}/{scratch or 'temporary'}: 1.1 GB are free, 1.1 GB are needed"


def test_a_damaged_manifest_is_told_as_what_the_node_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCLDM_STAGE", "on")
    node_tokens.leave(tmp_path, "first")
    (tmp_path / "manifest.json").write_text("{")
    (told,) = node_checks.folder_troubles(SimpleNamespace(shards=str(tmp_path)), tmp_path, "n1")
    assert told.startswith(f"{tmp_path}/manifest.json is damaged: not JSON")


def products(**change: float) -> dict[int, float]:
    return {rank: 0.1 * change.get(f"n{rank // 2 + 1}", 1.0) for rank in range(8)}


def test_a_slow_node_is_named_by_the_slowest_of_its_ranks(notes: Path) -> None:
    report = report_of(notes)
    report.products(products(n2=1.8))
    assert troubles_of(report) == {}
    report.products(products(n2=3.0))
    assert troubles_of(report) == {
        "n2": ["slow: a matrix product takes 300.00 ms, 3.0 times the median of the nodes"],
    }
    report = report_of(notes)
    report.products(products() | {7: 0.5})
    assert report.troubles["n4"][0].startswith("slow: a matrix product takes 500.00 ms, 5.0 times")


RING = [("n1", "n2"), ("n2", "n3"), ("n3", "n4"), ("n4", "n1")]


def judged_pairs(
    notes: Path, slow: dict[int, float], missing: dict[int, str] | None = None, ring: list[tuple[str, str]] = RING
) -> Report:
    """Of pairs 0 ... 3 those in `slow` take so many times as long; those in `missing` do not end."""
    report, outcomes = report_of(notes), {}
    for k, pair in enumerate(ring):
        ranks = report.course.ranks(pair)
        if k in (missing or {}):
            words = (missing or {})[k]
            outcomes[pair] = ({}, {rank: words if isinstance(words, str) else words[rank] for rank in ranks})
        else:
            outcomes[pair] = (dict.fromkeys(ranks, 1e-3 * slow.get(k, 1.0)), {})
    report.pairs(outcomes)
    return report


def test_the_node_of_slow_links_is_named_and_its_neighbours_are_not(notes: Path) -> None:
    assert list(troubles_of(judged_pairs(notes, {1: 9.0, 2: 9.0}))) == ["n3"]
    assert troubles_of(judged_pairs(notes, {1: 9.0})) == {}


HANGS = "hangs: it takes part in an all-reduce"


def test_the_node_whose_all_reduces_do_not_end_is_named_and_its_neighbours_are_not(notes: Path) -> None:
    told = troubles_of(judged_pairs(notes, {}, {1: HANGS, 2: "failed: RuntimeError: Connection closed by peer"}))
    assert list(told) == ["n3"]
    assert told["n3"][0] == f"an all-reduce of n2 and n3 does not end: rank 4 {HANGS}"
    both = "an all-reduce of n2 and n3 does not end: rank"  # the nodes, or what lies between them
    told = troubles_of(judged_pairs(notes, {}, {1: HANGS}))
    assert told == {"n2": [f"{both} 2 {HANGS}"], "n3": [f"{both} 4 {HANGS}"]}


def test_a_rank_that_died_explains_what_others_wait_for(notes: Path) -> None:
    """Of two nodes, too, the one that hangs is not named with the one that died."""
    words = dict.fromkeys(range(4), HANGS) | {3: "died or froze: it takes part in an all-reduce"}
    told = troubles_of(judged_pairs(notes, {}, {0: words}, RING[:1]))
    assert told == {"n2": ["rank 3 died or froze: it takes part in an all-reduce"]}


@pytest.mark.parametrize("words", ["failed: RuntimeError: no such network", HANGS])
@pytest.mark.parametrize("ring", [RING, RING[:1], [("n1", "n1")]])
def test_all_reduces_of_which_none_succeeds_are_no_nodes_fault(
    notes: Path, words: str, ring: list[tuple[str, str]]
) -> None:
    """As where NCCL_SOCKET_IFNAME names no network; of a single pair, nothing tells its nodes apart."""
    report = judged_pairs(notes, {}, dict.fromkeys(range(4), words), ring)
    assert troubles_of(report) == {}
    assert report.notes == [f"no all-reduce succeeds, of any nodes: rank 0 {words}"]
    assert report.hopeless


def test_a_death_explains_only_its_own_pairs(notes: Path) -> None:
    died = dict.fromkeys(range(8), HANGS) | {3: "died or froze: it takes part in an all-reduce"}
    report = judged_pairs(notes, {}, dict.fromkeys((0, 1), died), RING[:2])
    assert (list(troubles_of(report)), report.hopeless) == (["n2"], False)
    report = judged_pairs(notes, {}, dict.fromkeys(range(4), died))
    assert (list(troubles_of(report)), report.hopeless) == (["n2"], True)


@pytest.mark.parametrize("at", ["products", "pairs"])
def test_a_job_that_fails_on_every_node_runs_on_none(notes: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    monkeypatch.setenv("SCLDM_MIN_NODES", "1")
    report = judged_pairs(notes, {}, dict.fromkeys(range(4), "failed: E: x") if at == "pairs" else None)
    report.findings(findings())
    assert report.hopeless == (at == "pairs")
    report.failures({}, [])  # of no ranks none failed
    if at == "products":
        report.failures(dict.fromkeys(range(8), "failed: E: x"), range(8))
    assert report.write(SimpleNamespace()) == []
    assert (notes / "use_nodes").read_text() == ""
    assert (notes / "bad_nodes").read_text() == ""
    said = "no all-reduce succeeds, of any nodes: rank 0 failed: E: x" if at == "pairs" else "every rank failed: E: x"
    assert json.loads((notes / "preflight.json").read_text())["note"] == said


@pytest.mark.parametrize("n", range(1, 8))
def test_in_no_round_a_node_is_in_two_pairs(n: int) -> None:
    nodes = [f"n{k}" for k in range(n)]
    rounds = preflight_stages.rounds_of(nodes)
    assert sum(map(len, rounds)) == (n if n > 2 else 1)
    for pairs in rounds:
        busy = [node for pair in pairs for node in dict.fromkeys(pair)]
        assert len(busy) == len(set(busy))
    of_each = [sum(node in pair for pairs in rounds for pair in pairs) for node in nodes]
    assert of_each == [2 if n > 2 else 1] * n


@pytest.mark.parametrize(
    "n_fit, least, micro_batch, used, note",
    [
        (4, 2, 15, 4, ""),
        (3, 2, 20, 3, ""),
        (3, 2, 15, 2, "train.global_batch=120 with hardware.micro_batch=15 can't be split over 3 nodes of 2 ranks;"),
        (1, 2, 15, 0, "1 nodes are fit, 2 are needed"),
        (2, 1, 7, 0, "train.global_batch=120 can't be split over 2 nodes or fewer"),
        (3, 3, 15, 0, "train.global_batch=120 with hardware.micro_batch=15 can't be split over 3 nodes of 2 ranks; ov"),
        (3, 0, 15, 0, "3 nodes are fit, 4 are needed"),
        (4, 0, 20, 3, "train.global_batch=120 with hardware.micro_batch=20 can't be split over 4 nodes of 2 ranks;"),
    ],
)
def test_the_nodes_to_use(monkeypatch, n_fit: int, least: int, micro_batch: int, used: int, note: str) -> None:
    """least 0: no range was given."""
    monkeypatch.setenv("SCLDM_MIN_NODES", str(least or ""))
    config = SimpleNamespace(train=SimpleNamespace(global_batch=120), hardware=SimpleNamespace(micro_batch=micro_batch))
    use, told = nodes_to_use(config, HOSTS[:n_fit], Course(HOSTS, 2, Path(), 0.0))
    assert use == HOSTS[:used]
    assert told.startswith(note)
    assert bool(told) == bool(note)


# --- the course of it: ranks as threads, each with its fault --------------------------------------------------------


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
        node_tokens.leave(notes, node)
        self.at("findings", local)
        return {"same": {"numpy": "2.4"}, "gpu": [], "broken": [], "folders": [], "disk_gb": 1.0}

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
        store = preflight_stages.open_store()
        while rank not in self.dead and not self.released.wait(0.05):
            store.add(f"beats/{rank}", 1)

    def run(self) -> dict[str, list[str]]:
        store = preflight_stages.open_store(serves=True)
        STORES.append(store)
        self.course = replace(self.course, began=time.monotonic())
        for rank in set(range(6)) - self.absent:
            args = (self.course, self.refused.get(rank, SimpleNamespace()), rank, rank)
            threading.Thread(target=preflight_stages.take_part, args=args, daemon=True).start()
        preflight_stages.lead(self.course, self.refused.get(0, SimpleNamespace()), store)
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
    times = {"JOIN": 5.0 / 55, "PRODUCT_S": 2.0, "PAIR_S": 1.5, "LEAST_PAIR_S": 0.5, "BEAT_S": 0.1}
    for name, value in times.items():
        monkeypatch.setattr(preflight_stages, name, value)
    monkeypatch.setattr(preflight_stages, "findings_of", found.findings)
    monkeypatch.setattr(preflight_stages, "device_of", lambda local: local)
    monkeypatch.setattr(preflight_stages, "time_matmul", found.product)
    monkeypatch.setattr(preflight_stages, "time_all_reduce", found.all_reduce)
    monkeypatch.setattr(preflight_stages, "_beat", found.beat)
    yield found
    found.released.set()


def fails() -> None:
    raise OSError("no room")


def test_a_port_that_is_taken_is_no_nodes_fault(tmp_path: Path) -> None:
    """The first rank as its own process, which leaves word of itself before it reads torch."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SCLDM_HOSTS": "n1 n2", "SCLDM_NOTES": str(tmp_path)}
        env |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
        words = [sys.executable, "-m", "launch.preflight", "encode", "vae=a", "shards=b", "out=c"]
        done = subprocess.run(words, env=os.environ | env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert bad_nodes(tmp_path) == {}
    assert (tmp_path / "use_nodes").exists(), done.stderr
    assert (tmp_path / "use_nodes").read_text() == ""
    note = json.loads((tmp_path / "preflight.json").read_text())["note"]
    assert note.startswith(f"port {port} of n1 can't be served; where another program has it, submit again")
    assert [path.name for path in (tmp_path / "begun").iterdir()] == ["n1"]


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
        "n1": ["rank 1 did not come up"],
        "n2": ["rank 2 hangs: it looks at its folders"],
        "n5": ["rank 5 failed: InputError: unknown key 'data.x'"],
    }
    assert ranks.use == ["n3", "n4"]


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


# --- staging ---------------------------------------------------------------------------------------------------------


def staged(source: Path, out: Path, running: str = "7,8") -> int:
    return stage.run([f"source={source}", f"out={out}", f"running={running}"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_is_staged_whole_once_and_after_the_dead(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_set(tmp_path / "a set", known_cells())
    disk = tmp_path / "disk"
    (disk / "scldm-6" / "shards").mkdir(parents=True)  # of a job that no longer runs
    (disk / "scldm-6" / stage.MARK).touch()
    (disk / "scldm-8").mkdir()
    (disk / "scldm-8" / stage.MARK).touch()
    foreign = ["scldm-env", "scldm-5", "scldm-6_1", "scldm-6x"]  # of the user; one is named as a job's, without a mark
    for name in foreign:
        (disk / name / "lib").mkdir(parents=True)
        (disk / name / "lib" / "x").touch()
        if name != "scldm-5":
            (disk / name / stage.MARK).touch()
    assert staged(source, disk / "scldm-7") == 0
    assert files(disk / "scldm-7") == files(source) | {stage.MARK: b""}
    assert sorted(path.name for path in disk.iterdir()) == sorted(["scldm-7", "scldm-8", *foreign])
    assert files(disk / "scldm-env") == {"lib/x": b"", stage.MARK: b""}
    (damaged,) = list((disk / "scldm-7" / "shards").glob("train-000000.tar"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    assert staged(source, disk / "scldm-7") == 0
    assert files(disk / "scldm-7") == files(source) | {stage.MARK: b""}
    copied = float(capsys.readouterr().out.split("(")[1].split(" GB")[0])
    assert copied == pytest.approx(len(damaged.read_bytes()) / 1e9, abs=5e-4)


def test_a_damaged_set_is_not_staged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_set(tmp_path / "set", known_cells())
    shard = source / "shards" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert staged(source, tmp_path / "scldm-7") == 2
    assert f"{shard} is not as the manifest says" in capsys.readouterr().err
    assert not (tmp_path / "scldm-7" / "shards" / "train-000000.tar").exists()
    assert not (tmp_path / "scldm-7" / "manifest.json").exists()
