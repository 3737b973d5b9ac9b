"""What preflight concludes from findings and timings, and the staging of shards; the real thing runs in tests/slurm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import preflight, stage
from tests.data_pipeline.small_sets import known_cells, write_set

HOSTS = ["n1", "n2", "n3", "n4"]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every node has left its token."""
    monkeypatch.setattr(preflight, "SEEN_S", 0.0)
    for host in HOSTS:
        preflight.write_token(tmp_path, host)
    return tmp_path


def findings(n_ranks: int = 8) -> dict[int, preflight.Findings]:
    """Of nodes with two ranks, the first of which tells versions."""
    same = {"numpy": "2.4", "config": "abc"}
    return {rank: {"same": {} if rank % 2 else dict(same), "troubles": []} for rank in range(n_ranks)}


def judged(found: dict[int, preflight.Findings], notes: Path, hosts: list[str] = HOSTS) -> dict[str, list[str]]:
    troubles = preflight.judge_findings(found, hosts, 2, notes)
    return {node: reasons for node, reasons in troubles.items() if reasons}


def test_equal_nodes_are_fit(notes: Path) -> None:
    assert judged(findings(), notes) == {}


def test_a_rank_that_never_came_up_is_named(notes: Path) -> None:
    found = findings()
    del found[5]
    assert judged(found, notes) == {"n3": ["rank 5 did not come up"]}


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


def timings(**change: float) -> dict[int, preflight.Findings]:
    """Of 4 nodes x 2 ranks, pairs 0-1, 1-2, 2-3, 3-0; nK or linkK is so many times as slow."""
    found = {}
    for rank in range(8):
        node = rank // 2
        pairs = {str(k): 1e-3 * change.get(f"link{k}", 1.0) for k in (node, (node - 1) % 4)}
        found[rank] = {"matmul_s": 0.1 * change.get(f"n{node + 1}", 1.0), "all_reduce_s": pairs}
    return found


def test_a_slow_node_is_named() -> None:
    assert preflight.judge_timings(timings(n2=1.8), HOSTS, 2) == {}
    told = preflight.judge_timings(timings(n2=3.0), HOSTS, 2)
    assert told == {"n2": ["slow: a matrix product takes 300.00 ms, 3.0 times the median of the nodes"]}


def test_the_node_of_slow_links_is_named_and_its_neighbours_are_not() -> None:
    told = preflight.judge_timings(timings(link1=9.0, link2=9.0), HOSTS, 2)
    assert list(told) == ["n3"]
    assert preflight.judge_timings(timings(link1=9.0), HOSTS, 2) == {}


def test_one_slow_rank_makes_a_slow_node_and_a_hung_one_is_named() -> None:
    found = timings()
    found[7]["matmul_s"] = 0.5
    del found[4]
    told = preflight.judge_timings(found, HOSTS, 2)
    assert told["n3"] == ["rank 4 hung in an all-reduce with a neighbour"]
    assert told["n4"][0].startswith("slow: a matrix product takes 500.00 ms, 5.0 times")


@pytest.mark.parametrize(
    "n_fit, least, micro_batch, used, note",
    [
        (4, 2, 15, 4, ""),
        (3, 2, 20, 3, ""),
        (3, 2, 15, 2, "train.global_batch=120 with hardware.micro_batch=15 can't be split over 3 nodes of 2 ranks;"),
        (1, 2, 15, 0, "1 nodes are fit, 2 are needed"),
        (2, 1, 7, 0, "train.global_batch=120 can't be split over 2 nodes or fewer"),
    ],
)
def test_the_nodes_to_use(monkeypatch, n_fit: int, least: int, micro_batch: int, used: int, note: str) -> None:
    monkeypatch.setenv("SCLDM_MIN_NODES", str(least))
    monkeypatch.setenv("SCLDM_HOSTS", " ".join(HOSTS))
    config = SimpleNamespace(train=SimpleNamespace(global_batch=120), hardware=SimpleNamespace(micro_batch=micro_batch))
    use, told = preflight.nodes_to_use(config, HOSTS[:n_fit], 2)
    assert use == HOSTS[:used]
    assert told.startswith(note)
    assert bool(told) == bool(note)


# --- staging ---------------------------------------------------------------------------------------------------------


def staged(source: Path, out: Path, running: str = "7,8") -> int:
    return stage.run([f"source={source}", f"out={out}", f"running={running}"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_is_staged_whole_once_and_after_the_dead(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_set(tmp_path / "a set", known_cells())
    disk = tmp_path / "disk"
    (disk / "scldm-6" / "shards").mkdir(parents=True)  # of a job that no longer runs
    (disk / "scldm-8").mkdir()
    assert staged(source, disk / "scldm-7") == 0
    assert files(disk / "scldm-7") == files(source)
    assert sorted(path.name for path in disk.iterdir()) == ["scldm-7", "scldm-8"]
    (damaged,) = list((disk / "scldm-7" / "shards").glob("train-000000.tar"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    assert staged(source, disk / "scldm-7") == 0
    assert files(disk / "scldm-7") == files(source)
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
