"""A run that is told to stop, or loses a rank, on a real Slurm: it goes on where it was, or ends for good."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from launch.cluster import commands as slurm
from launch.cluster import submit
from launch.cluster.notes import nodes_in, state_of
from scldm.train.tracking import read_metrics
from tests.slurm.runs import ROOT, Cluster, Run, assert_same_weights, wait_for

pytestmark = pytest.mark.slow
seen_with_a_stand_in = pytest.mark.exhaustive  # each is held by test_job_script.py too, without a Slurm


def assert_went_on(run: Run, undisturbed: Path, event: str = "stop") -> None:
    assert run.ends() == "DONE", run.log
    assert [what for what, _, _ in run.events()] == ["start", event, "start"]
    for (_, _, stopped), (_, _, begun) in zip(run.events()[1::2], run.events()[2::2]):
        assert 0 < stopped < 40
        assert begun == stopped
    assert_same_weights(run.folder, undisturbed)


def test_preempted_by_a_higher_partition(cluster: Cluster, chain: Path) -> None:
    run = Run(
        *(cluster, "preempted", chain / "shards", "tracking.enabled=true", "tracking.every_s=1"),
        *("--nodes", "2", "--preflight", "false"),
    )
    run.reaches(5)
    cluster.call("srun", "--partition=high", "--nodes=4", "--exclusive", "true")
    assert_went_on(run, chain / "vae")
    with sqlite3.connect(run.folder / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)  # the same run went on
    steps = [row["step"] for row in read_metrics(run.folder, "train")]
    assert steps == list(range(1, 41))


def rank_of(job: str, rank: int) -> int:
    """The process of a rank of a job that trains."""
    marks = [f"SLURM_JOB_ID={job}\0".encode(), f"SLURM_PROCID={rank}\0".encode()]
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            if (
                b"python" in command.split(b"\0")[0]
                and b"launch.cli" in command
                and all(m in environment for m in marks)
            ):
                return int(folder.name)
    raise AssertionError(f"rank {rank} of job {job} does not run")


def nothing_is_staged(cluster: Cluster) -> bool:
    return not list((cluster.folder / "disks").glob("*/scldm-*"))


def test_a_killed_rank(cluster: Cluster, chain: Path) -> None:
    """As by the kernel where memory is used up; with shards on the nodes' own disks."""
    run = Run(cluster, "killed", chain / "shards", "--nodes", "2", "--preflight", "false", "--stage")
    wait_for((run.folder / "checkpoints" / "latest").is_file, 200, lambda: run.log)
    assert not nothing_is_staged(cluster)
    os.kill(rank_of(run.job, 1), signal.SIGKILL)
    assert_went_on(run, chain / "vae", "failure")
    assert "REQUEUED: by a rank killed by SIGKILL, as where memory is used up, at " in run.log
    assert nothing_is_staged(cluster)


FAILING = """
import os, time
if os.environ.get("SLURM_PROCID"):
    import torch
    wait = lambda n: time.sleep(60)
    torch.set_num_threads = {}.__getitem__ if os.environ["SLURM_PROCID"] == "1" else wait
"""


def test_an_exception_of_one_rank_is_no_signal(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a verb whose ranks srun then ends, and returns the signal that it sent them."""
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    out, there = cluster.runs / "failing", cluster.runs / "there"
    there.mkdir()
    for name in ("config.json", "manifest.json"):  # it fails before it reads more of them
        (there / name).write_text("{}")
    words = [
        f"vae={there}",
        f"shards={there}",
        "threads=7",
        f"out={out}",
        "--nodes",
        "2",
        "--preflight",
        "false",
    ]
    submit.main(submit.read(["encode", *words]))
    notes = Path(f"{out}.slurm")
    wait_for(lambda: state_of(notes).state in ("FAILED", "REQUEUED"), 90, lambda: (notes / "log.txt").read_text())
    assert state_of(notes).state == "FAILED"
    assert state_of(notes).reason == "exit code 1: rank 1 on sim2: KeyError: 7"


@pytest.mark.exhaustive  # a unit test has it without Slurm
def test_a_cancelled_job_leaves_nothing_on_the_nodes(cluster: Cluster, shards: Path) -> None:
    """Slurm starts no step for it any more, and gives it three seconds."""
    run = Run(cluster, "cancelled", shards, "--nodes", "2", "--preflight", "false", "--stage")
    run.reaches(5)
    assert not nothing_is_staged(cluster)
    cluster.call("scancel", run.job)
    wait_for(lambda: slurm.job_state(run.job)[0] == "CANCELLED", 60, lambda: run.log)
    wait_for(lambda: nothing_is_staged(cluster), 20, lambda: run.log)


@pytest.mark.exhaustive  # preemption and the time limit come to the ranks by the same way
def test_told_by_scancel(cluster: Cluster, chain: Path) -> None:
    run = Run(cluster, "told", chain / "shards", "--nodes", "2", "--preflight", "false")
    run.reaches(5)
    cluster.call("scancel", "--signal=USR1", run.job)
    assert_went_on(run, chain / "vae")


SLOW = """
import os, time, torch
backward = torch.Tensor.backward
def slow(*args, **kwargs):
    if os.path.exists("{flag}"):
        time.sleep(1.0)
    return backward(*args, **kwargs)
torch.Tensor.backward = slow
"""


@pytest.mark.exhaustive  # Slurm looks at the limits twice a minute
def test_the_time_limit(cluster: Cluster, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In mid-training the limit becomes the next full minute that leaves 40 s, so that the warning is due at once."""
    flag = tmp_path / "slow"
    flag.touch()
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(flag=flag))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    run = Run(
        *(cluster, "timed", chain / "shards", "--nodes", "2", "--preflight", "false", "--warn-s", "90"),
        *("--", "--time=30"),
    )
    began = time.monotonic()
    run.reaches(2)
    minutes = int(time.monotonic() - began + 40) // 60 + 1
    cluster.call("scontrol", "update", f"jobid={run.job}", f"timelimit={minutes}")
    wait_for(lambda: "REQUEUED" in run.log, 120, lambda: run.log)
    flag.unlink()
    cluster.call("scontrol", "update", f"jobid={run.job}", "timelimit=30")
    assert "REQUEUED: by the time limit, at " in run.log
    # the job's own matter, which counts among --max-failures where nothing was done since the last
    assert_went_on(run, chain / "vae", "failure")


def preflight_begins(run: Run, start: int) -> None:
    """Until its ranks are Slurm's: a step of this start runs."""
    wait_for(lambda: f"(start {start}," in run.log, 200, lambda: run.log)
    steps = ("squeue", "--noheader", "--steps", f"--jobs={run.job}", "--format=%i")
    wait_for(lambda: ".0" in run.cluster.call(*steps), 30, lambda: run.log)


@seen_with_a_stand_in
def test_preempted_twice_in_preflight(cluster: Cluster, shards: Path) -> None:
    """Nothing was done since the last time, and that is no fault of the job."""
    run = Run(cluster, "twice", shards, "--nodes", "2", "--max-failures", "1")
    for start in (1, 2):
        preflight_begins(run, start)
        time.sleep(3 * (start - 1))  # at its beginning, and in its midst
        cluster.call("srun", "--partition=high", "--nodes=4", "--exclusive", "true")
    assert run.ends(400) == "DONE", run.log
    assert run.events()[:5] == [(what, k, 0) for k in (0, 1) for what in ("start", "stop")] + [("start", 2, 0)]
    requeued = [line for line in run.log.splitlines() if ": REQUEUED: by " in line][:2]
    assert all("during preflight" in line for line in requeued), requeued  # by the job in time, or by Slurm after that
    assert not nodes_in(run.notes / "bad_nodes")


def test_cancelled_in_preflight(cluster: Cluster, shards: Path) -> None:
    run = Run(cluster, "cancelled early", shards, "--nodes", "2")
    preflight_begins(run, 1)
    cluster.call("scancel", run.job)
    wait_for(lambda: "CANCELLED: by Slurm" in run.log, 60, lambda: run.log)
    wait_for(lambda: state_of(run.notes).state == "CANCELLED", 30, lambda: state_of(run.notes).state)


@seen_with_a_stand_in
def test_where_no_job_may_requeue_another_one_goes_on(cluster: Cluster, shards: Path) -> None:
    run = Run(cluster, "no requeue", shards, "--nodes", "2", "--preflight", "false", "--", "--no-requeue")
    run.reaches(5)
    cluster.call("scancel", "--signal=USR1", run.job)
    wait_for(lambda: f"REQUEUED: as job {int(run.job) + 1}, by a signal" in run.log, 60, lambda: run.log)
    assert run.ends(400) == "DONE", run.log
    assert state_of(run.notes).job == str(int(run.job) + 1)
    assert "will not run" not in run.log
    assert [row["step"] for row in read_metrics(run.folder, "train")] == list(range(1, 41))


KILLED = """
import os, signal
if os.environ.get("SLURM_PROCID"):
    import torch
    torch.set_num_threads = lambda n: os.kill(os.getpid(), signal.SIGKILL)
"""


@seen_with_a_stand_in
def test_failures_without_progress_end(
    cluster: Cluster, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    run = Run(cluster, "loop", shards, "--nodes", "2", "--preflight", "false", "--max-failures", "2")
    assert run.ends() == "FAILED"
    assert "2 failures without progress (still at 0)" in run.log
    assert [what for what, *_ in run.events()] == ["start", "failure", "start"]
