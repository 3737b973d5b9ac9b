"""Shards copied to a node's own disk before ranks start."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cluster import copy_shards as stage
from tests.data_pipeline.small_sets import known_cells, write_set


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
