"""The same bytes whoever does the work, however often it is killed or done twice; nothing looks whole that isn't."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.convert import stages, write_shards
from data_pipeline.convert.stages import Worker
from data_pipeline.write_soma import SomaWriteConfig, write_soma
from scldm.errors import InputError
from tests.data_pipeline.atlases import FilterConfig, SplitConfig, config, digest

write = write_shards.write_shards


@pytest.mark.heavy
def test_bytes_do_not_depend_on_memory_or_tasks(tmp_path, source, monkeypatch, capsys):
    """Chunks of a few rows, runs of a few chunks, units of 100 cells: every boundary is met."""
    _, path = source
    settings = {"filter": FilterConfig(min_genes=100, min_cells=95, n_top_genes=300), "source": {"layer": "X"}}
    write(config(tmp_path / "whole", path, **settings))
    monkeypatch.setattr("data_pipeline.convert.plan.UNIT_CELLS", 100)
    monkeypatch.setattr("data_pipeline.convert.source_h5ad.CHUNK_BYTES", 20_000)
    arena = stages.Arena.__init__
    monkeypatch.setattr(stages.Arena, "__init__", lambda self, budget: arena(self, 10_000))
    write(config(tmp_path / "small", path, **settings))
    assert digest(tmp_path / "small") == digest(tmp_path / "whole")

    command = config(tmp_path / "tasks", path, **settings)
    for turn in range(5):  # scan, clip, scatter, gather, each waiting for the last; then nothing is left
        results = [write(replace(command, task=f"{i}/3")) for i in range(3)]
        assert results == [None] * 3, f"turn {turn}"
    assert not (tmp_path / "tasks/manifest.json").exists()
    assert "every task's share is done" in capsys.readouterr().out
    assert write(replace(command, task="0/3", finish=True)) is not None
    assert digest(tmp_path / "tasks") == digest(tmp_path / "whole")


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers(tmp_path, source):
    _, path = source
    soma = tmp_path / "soma"
    write_soma(SomaWriteConfig(h5ad=str(path), out=str(soma)))
    for name, workers in (("one", 1), ("two", 2)):
        write(config(tmp_path / name, soma, workers=workers))
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def killed(task: tuple[str, int]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_said_and_its_unit_done_by_the_next_run(tmp_path, source, monkeypatch):
    _, path = source
    command = config(tmp_path / "set", path, workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "_do_unit", killed)
        with pytest.raises(InputError, match=r"scatter: a worker process died .* fewer workers than 2"):
            write(command)
    assert write(replace(command, workers=1)) is not None


KILLED = """
import sys, time
from data_pipeline.convert import plan
from data_pipeline.convert import stages
from launch.cli import main
plan.UNIT_CELLS = 50
work = stages.Worker.do
stages.Worker.do = lambda self, stage, unit: (time.sleep(0.02), work(self, stage, unit))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, source):
    _, path = source
    write(config(tmp_path / "whole", path, split=SplitConfig(stratify=("cell_type",))))
    words = ["shards", "write", f"out={tmp_path / 'killed'}", f"source.paths={path}", "conditions=cell_type"]
    words += ["block_cells=32", "shard_cells=128", "split.stratify=cell_type"]
    rng = np.random.default_rng(0)
    kills, status = 0, None
    while status is None or status < 0:
        assert kills < 40
        work = tmp_path / "killed/.work"
        before = files_of(work)
        process = subprocess.Popen([sys.executable, "-c", KILLED, *words], stderr=subprocess.DEVNULL)
        while process.poll() is None and files_of(work) <= before:
            time.sleep(0.005)  # Python still starts
        # early at first: a quick machine is soon done; later and later: a busy one must come to its next file
        time.sleep(rng.uniform(0, 0.2 if kills < 3 else 0.9 + 0.1 * kills))
        process.send_signal(signal.SIGKILL)
        status = process.wait()
        kills += status < 0
    assert status == 0
    assert kills >= 3
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def files_of(folder: Path) -> set[str]:
    """What lies in a folder that another process may be writing."""
    return {os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names}


def test_a_plan_that_a_kill_left_half_made_does_not_stand_in_the_way(tmp_path, source):
    (tmp_path / "set/.work/.plan.0123456789ab.partial").mkdir(parents=True)
    write(config(tmp_path / "set", source[1]))
    assert not (tmp_path / "set/.work").exists()


def test_finished_work_is_not_repeated(tmp_path, source, monkeypatch):
    """The last step fails once; the second run does that step alone."""
    _, path = source
    command = config(tmp_path / "set", path)
    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "finish_set", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(command)
    done: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "do", lambda self, stage, unit: done.append(stage))
        os.remove(tmp_path / "set/shards/train-000001.tar")  # a tar that went missing is not finished work
        with pytest.raises(AssertionError):
            write(command)
    assert done == ["gather"]
    assert write(command) is not None
    assert write(command) is not None  # complete: says so, changes nothing
    assert not (tmp_path / "set/.work").exists()
    (tmp_path / "set/.work/runs").mkdir(parents=True)  # as an interrupted removal leaves it
    assert write(command) is not None
    assert not (tmp_path / "set/.work").exists()


@pytest.mark.parametrize("name", ["scratch", "set"])
def test_only_our_own_unfinished_work_is_removed(tmp_path, source, name, monkeypatch):
    """work= names the user's folder, or even the set's own; ours is one within it, found again after a kill."""
    _, path = source
    work = tmp_path / name
    work.mkdir()
    if name == "scratch":
        (work / "thesis.txt").touch()
    command = replace(config(tmp_path / "set", path), work=str(work))
    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "finish_set", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(command)
    manifest = write(command)
    assert manifest is not None
    assert sorted(p.name for p in work.iterdir()) == (
        ["thesis.txt"] if name == "scratch" else ["index", "manifest.json", "shards"]
    )
    assert len(list((tmp_path / "set/shards").iterdir())) == len(manifest.shards)


def test_a_strangers_work_folder_is_left_alone(tmp_path, source):
    thesis = tmp_path / "set/.work/thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.touch()
    with pytest.raises(InputError, match=r"\.work: holds other files, such as thesis.txt. Name another"):
        write(config(tmp_path / "set", source[1]))
    assert thesis.exists()


def test_one_process_at_a_time_does_a_share(tmp_path, source, monkeypatch):
    """A second start of a command that runs, of a task that runs, or --finish beside tasks that run."""
    wanted = config(tmp_path / "set", source[1])
    refused: list[str] = []
    scatter = Worker.scatter

    def meanwhile(worker, unit):
        for task in ("", "1/2", "0/2"):
            try:
                write(replace(wanted, task=task))
            except InputError as error:
                refused.append(f"{task}: {error}")
        return scatter(worker, unit)

    monkeypatch.setattr(Worker, "scatter", meanwhile)
    write(replace(wanted, task="0/2"))
    monkeypatch.setattr(Worker, "scatter", scatter)
    assert re.match(r": .*another process is writing this set", refused[0])
    assert any(re.match(r"0/2: .*another process is doing task=0/2", text) for text in refused)
    assert not any(text.startswith("1/2") for text in refused)
    write(replace(wanted, task="1/2"))
    assert write(replace(wanted, finish=True)) is not None


def test_a_source_that_changed_after_its_set_was_written(tmp_path, source):
    path = tmp_path / "a.h5ad"
    path.write_bytes(source[1].read_bytes())
    wanted = config(tmp_path / "set", path)
    assert write(wanted) is not None
    assert write(wanted) is not None
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match=r"a\.h5ad has changed since this set was written"):
        write(wanted)
    path.unlink()  # a set outlives its source
    assert write(wanted) is not None


def test_shards_of_unfinished_work_that_is_gone_are_not_taken_over(tmp_path, source):
    """Someone removed .work and left its tars: they would be read as this command's, or fail `shards verify`."""
    (tmp_path / "set/shards").mkdir(parents=True)
    (tmp_path / "set/shards/train-00000.tar").write_bytes(b"another's")
    with pytest.raises(InputError, match="holds shards of unfinished work that is gone. Remove them"):
        write(config(tmp_path / "set", source[1]))
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["shards"]
