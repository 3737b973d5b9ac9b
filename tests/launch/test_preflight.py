"""What preflight concludes from findings and timings; the real thing runs in tests/slurm."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.cluster import node_checks, node_judgement, preflight
from launch.cluster.node_checks import Findings
from launch.cluster.node_judgement import ABSENT, Course, Report, nodes_to_use
from launch.cluster.notes import bad_nodes, leave_word

HOSTS = ["n1", "n2", "n3", "n4"]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every node has left its token."""
    monkeypatch.setattr(node_judgement, "SEEN_S", 0.0)
    for host in HOSTS:
        leave_word(tmp_path, host)
    return tmp_path


def findings(n_ranks: int = 8) -> dict[int, Findings]:
    """Of nodes with two ranks, the first of which tells versions."""
    same = {"numpy": "2.4", "config": "abc"}
    return {rank: Findings([], []) if rank % 2 else Findings([], [], dict(same), []) for rank in range(n_ranks)}


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
    found[0].same["numpy"] = "1.26"
    assert judged(found, notes) == {"n1": ["numpy is 1.26, on other nodes 2.4"]}
    del found[2].same["config"]
    assert judged(found, notes)["n2"] == ["config is missing, on other nodes abc"]
    found = findings(4)
    found[2].same["config"] = "xyz"
    assert judged(found, notes, HOSTS[:2]) == {"n2": ["config is xyz, on other nodes abc"]}


@pytest.mark.parametrize("hosts, unseen", [(HOSTS, ["n2", "n4"]), (HOSTS, ["n2", "n3", "n4"]), (HOSTS[:2], ["n2"])])
def test_a_folder_that_is_not_shared_is_seen(
    notes: Path, monkeypatch: pytest.MonkeyPatch, hosts: list[str], unseen: list[str]
) -> None:
    """Of a node alone; or of the first one, on which the job's script works: then it runs nowhere."""
    monkeypatch.setenv("SCLDM_MIN_NODES", "1")
    for node in unseen:
        (notes / "preflight" / node).write_text("another job's")
    (notes / "preflight" / unseen[0]).unlink()
    report = report_of(notes, hosts)
    report.findings(findings(2 * len(hosts)))
    told, use = troubles_of(report), report.write(SimpleNamespace())
    if len(unseen) == 3:
        assert (list(told), use) == (["n1"], [])
        assert report.notes == [f"{notes} is not on n1 what it is elsewhere, or is each node's own"]
    else:
        assert told == {node: [f"{notes}: what it writes there is not seen on the first node"] for node in unseen}
        assert use == [host for host in hosts if host not in unseen]


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
    report.failures(words | {6: ABSENT, 7: ABSENT}, range(8))
    assert list(troubles_of(report)) == ["n4"]
    assert report.notes == ["on every node a rank hangs: it looks at its folders"]
    report = report_of(notes)
    report.failures(dict.fromkeys(range(8), ABSENT), range(8))
    assert list(troubles_of(report)) == HOSTS


def test_a_mistake_in_the_job_excludes_no_node_from_the_next_submission(notes: Path) -> None:
    """A typo in data.shards is met on all nodes; what is free on their disks differs, and all of it is too little."""
    disk = [f"/disk: {k}.1 GB are free, 9.0 GB are needed" for k in range(4)]
    for words in (["typo: no shard set is seen here"] * 4, disk):
        report, found = report_of(notes), findings()
        for rank, trouble in zip((0, 2, 4, 6), words):
            found[rank] = replace(found[rank], folders=[trouble])
        report.findings(found)
        assert report.write(SimpleNamespace()) == []
        assert bad_nodes(notes) == {}
        assert report.notes == [f"on every node: {words[0]}"]


@pytest.mark.parametrize("setting", [True, False])
def test_gpus_that_no_node_has_are_a_wrong_setting_and_memory_errors_are_not(notes: Path, setting: bool) -> None:
    for hosts in (HOSTS, HOSTS[:1]):
        report, found = report_of(notes, hosts), findings(2 * len(hosts))
        for rank in found:
            trouble = [f"{rank} GPUs are there"] if setting else ["GPU 0: 3 errors"]
            found[rank] = replace(found[rank], **{"gpu" if setting else "broken": trouble})
        report.findings(found)
        assert report.hopeless == setting
        assert list(troubles_of(report)) == ([] if setting else hosts)


def test_of_a_single_node_what_some_of_its_ranks_meet_is_the_nodes_fault(notes: Path) -> None:
    report, found = report_of(notes, HOSTS[:1]), findings(2)
    found[1] = replace(found[1], gpu=["its GPU of rank 1: gone"])
    report.findings(found)
    report.failures({0: "hangs: it computes a matrix product"}, [0, 1])
    assert not report.hopeless
    assert troubles_of(report) == {"n1": ["its GPU of rank 1: gone", "rank 0 hangs: it computes a matrix product"]}
    report = report_of(notes, HOSTS[:1])
    report.failures(dict.fromkeys((0, 1), "hangs: it computes a matrix product"), [0, 1])
    assert (report.hopeless, troubles_of(report)) == (True, {})


def test_a_node_that_was_late_is_left_out_the_second_time(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCLDM_MIN_NODES", "1")
    for expected in ({}, {"n2": "rank 2 did not come up in time. --preflight-s gives more"}):
        report = report_of(notes)
        report.findings({rank: one for rank, one in findings().items() if rank not in (2, 3)})
        report.failures({2: ABSENT}, range(8))
        assert report.write(SimpleNamespace()) == ["n1", "n3", "n4"]
        assert {node: why.split(":")[0] for node, why in bad_nodes(notes).items()} == expected
    report = report_of(notes)
    report.failures({0: ABSENT, 6: "failed: E"}, [0, 2, 4, 6])
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
    assert node_checks.folder_troubles(SimpleNamespace(), tmp_path, "n1") == []
    (told,) = node_checks.folder_troubles(SimpleNamespace(), tmp_path, "n1")
    assert told == f"{tmp_path}/{scratch or 'temporary'}: 1.07 GB are free, 1.07 GB are needed"


def test_a_damaged_manifest_is_told_as_what_the_node_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCLDM_STAGE", "on")
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
    assert (notes / "bad_nodes").read_text() == ""
    said = "no all-reduce succeeds, of any nodes: rank 0 failed: E: x" if at == "pairs" else "every rank failed: E: x"
    assert json.loads((notes / "preflight.json").read_text())["note"] == said


@pytest.mark.parametrize("n", range(1, 8))
def test_in_no_round_a_node_is_in_two_pairs(n: int) -> None:
    nodes = [f"n{k}" for k in range(n)]
    rounds = preflight.rounds_of(nodes)
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
        (3, 2, 15, 2, "train.global_batch=120 with hardware.micro_batch=15 can't be split over 3 nodes of 2 ranks."),
        (1, 2, 15, 0, "1 nodes are fit, 2 are needed"),
        (2, 1, 7, 0, "train.global_batch=120 with hardware.micro_batch=7 can't be split over 1 to 2 nodes of 2 ranks"),
        (3, 3, 15, 0, "train.global_batch=120 with hardware.micro_batch=15 can't be split over 3 nodes of 2 ranks"),
        (3, 0, 15, 0, "3 nodes are fit, 4 are needed"),
        (4, 0, 20, 3, "train.global_batch=120 with hardware.micro_batch=20 can't be split over 4 nodes of 2 ranks."),
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
