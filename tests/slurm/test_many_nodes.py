"""On a real Slurm, four nodes on this host (cluster.sh): the chain, stops of every kind, lost and unfit nodes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import pytest
import torch
from safetensors.torch import load_file

from launch import slurm, submit
from launch.cli import main
from launch.notes import state_of
from launch.quickstart import write_builtin_cells
from scldm.train.tracking import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = str(Path(__file__).with_name("cluster.sh"))
pytestmark = pytest.mark.slow

TRAIN = [
    *(
        "train.steps=40",
        "train.validate_every=20",
        "train.log_every=1",
        "train.save_every=10",
        "tracking.enabled=false",
    ),
    *("model.width=16", "model.n_layers=1", "model.n_heads=2"),
]
VAE = ["vae/tiny", "hardware/cpu", *TRAIN, "model.n_latents=2", "model.latent_width=4"]
LDM = ["ldm/tiny", "hardware/cpu", *TRAIN]


class Cluster:
    """Four nodes, sim1 ... sim4."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder, self.runs = folder, runs

    def call(self, *words: str) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=90).stdout

    def crash(self, node: int) -> None:
        self.call("bash", SCRIPT, "crash", str(self.folder), str(node))

    def revive(self, node: int) -> None:
        self.call("bash", SCRIPT, "revive", str(self.folder), str(node))


def wait_for(what: Callable[[], object], seconds: float, told: Callable[[], str] = lambda: "") -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"not within {seconds} s: {told()}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    why_not = subprocess.run(["bash", SCRIPT, "why-not"], capture_output=True, text=True).stdout.strip()
    if why_not:
        pytest.skip(f"needs a Slurm of its own: {why_not}")
    folder, runs = tmp_path_factory.mktemp("slurm"), tmp_path_factory.mktemp("runs") / "my runs"
    site, places = folder / "site.sh", f"'{runs}:{folder / 'disk'}'"
    lines = {
        "PARTITION": "low",
        "GPUS_PER_NODE": 0,
        "TASKS_PER_NODE": 1,
        "SHARED": places,
        "SCRATCH": folder / "disk",
    }
    site.write_text("".join(f"SCLDM_{key}={value}\n" for key, value in lines.items()))
    try:
        subprocess.run(["bash", SCRIPT, "start", str(folder), "4"], check=True, timeout=90)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv("SCLDM_SITE", str(site))
            patch.setenv("PYTHONPATH", str(ROOT))
            yield Cluster(folder, runs)
    finally:
        subprocess.run(["bash", SCRIPT, "stop", str(folder)], check=True, timeout=60)


class Run:
    """One training run as a job."""

    def __init__(self, cluster: Cluster, name: str, shards: Path, *words: str) -> None:
        self.cluster, self.folder = cluster, cluster.runs / name
        self.words = ["train", "vae", *VAE, f"data.shards={shards}", f"run_dir={self.folder}"]
        (self.job,) = submit.main(submit.read([*self.words, *words]))

    @property
    def notes(self) -> Path:
        return self.folder / "slurm"

    @property
    def log(self) -> str:
        path = self.notes / "log.txt"
        return path.read_text() if path.exists() else ""

    @property
    def step(self) -> int:
        return max([row["step"] for row in read_metrics(self.folder, "train")], default=0)

    def reaches(self, step: int, seconds: float = 200) -> None:
        wait_for(lambda: self.step >= step, seconds, lambda: self.log)

    def ends(self, seconds: float = 300) -> str:
        wait_for(lambda: state_of(self.notes).state in ("DONE", "FAILED", "STOPPED"), seconds, lambda: self.log)
        return state_of(self.notes).state

    def events(self) -> list[tuple[str, int, int]]:
        """(start or stop, restarts before it, step) of every start and stop."""
        rows = [line.split("\t") for line in (self.notes / "history").read_text().splitlines()]
        return [(what, int(restart), int(step)) for what, _, restart, step in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    parts = [load_file(path) for path in sorted(latest.glob("*.safetensors"))]
    names = {name for part in parts for name in part}
    # each rank holds a piece of every flattened parameter, in the order of the ranks
    return {name: torch.cat([part[name].flatten() for part in parts if name in part]) for name in names}


def assert_same_weights(run: Path, other: Path) -> None:
    """To the bit."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0.0, atol=0.0)


def curve(run: Path, split: str, metric: str) -> dict[int, float]:
    """By step."""
    return {row["step"]: row[metric] for row in read_metrics(run, split)}


# --- the whole chain -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(cluster: Cluster) -> Path:
    """The quickstart's cells through `scldm submit pipeline` on two nodes, sharding as an array of two."""
    out = cluster.runs / "chain"
    cluster.runs.mkdir(exist_ok=True)
    write_builtin_cells(cluster.runs / "cells.h5ad")
    labels = sorted(set(ad.read_h5ad(cluster.runs / "cells.h5ad").obs["cell_type"]))
    (cluster.runs / "wanted.csv").write_text("".join(["cell_type,n_cells\n", *(f"{label},6\n" for label in labels)]))
    words = [*("vae." + word if "=" in word else word for word in VAE), "ldm/tiny", *("ldm." + word for word in TRAIN)]
    words += [f"shards.{word}" for word in shard_words(cluster)]
    words += [f"generate.conditions={cluster.runs}/wanted.csv", "generate.sampler.n_steps=4"]
    words += ["evaluate.condition=cell_type", "evaluate.tracking.enabled=false", f"out={out}"]
    # each preflight starts two more Pythons: the tests below have it
    submit.main(submit.read(["pipeline", *words, "--nodes", "2", "--tasks", "2", "--preflight", "false"]))
    (last,) = [Path(p) for p in json.loads((out / "slurm" / "chain.json").read_text())][-1:]
    wait_for(lambda: state_of(last).state in ("DONE", "FAILED", "CANCELLED"), 600, lambda: chain_log(out))
    assert state_of(last).state == "DONE", chain_log(out)
    return out


def shard_words(cluster: Cluster) -> list[str]:
    return [
        *(f"source.paths={cluster.runs}/cells.h5ad", "conditions=cell_type", "split.stratify=cell_type"),
        *("split.validation=0.2", "split.test=0.2", "block_cells=32", "shard_cells=64"),
    ]


def chain_log(out: Path) -> str:
    return "\n".join(f"{path}: {path.read_text()[-1500:]}" for path in sorted((out / "slurm").rglob("log*.txt")))


def test_the_chain_makes_everything(chain: Path, capsys: pytest.CaptureFixture) -> None:
    assert json.loads((chain / "evaluation" / "evaluation.json").read_text())
    assert main(["status", str(chain)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["DONE"] * 10


def test_a_failed_link_stops_what_depends_on_it(cluster: Cluster, capsys: pytest.CaptureFixture) -> None:
    out = cluster.runs / "failed chain"
    (cluster.runs / "none.h5ad").write_text("no cells")
    words = [
        "vae/tiny",
        "ldm/tiny",
        "hardware/cpu",
        f"shards.source.paths={cluster.runs}/none.h5ad",
        "generate.n=9",
        f"out={out}",
    ]
    ids = submit.main(submit.read(["pipeline", *words, "--tasks", "2"]))
    wait_for(lambda: slurm.job_states()[ids[-1]][0] == "CANCELLED", 90, lambda: chain_log(out))
    capsys.readouterr()
    assert main(["status", str(out)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["stage-1", "FAILED"]
    assert len(others) == 9
    for line in others:
        assert line.endswith("it depends on stage-1, which ended as FAILED"), line
    log = (out / "slurm" / "shards" / "stage-1" / "log-0.txt").read_text()
    assert "none.h5ad" in log
    assert f"job {ids[1]} (shards-2) depends on this one and will not run" in log


def test_an_array_writes_the_shards_of_a_local_run(cluster: Cluster, chain: Path) -> None:
    assert main(["shards", "write", *shard_words(cluster), f"out={cluster.runs}/local shards"]) == 0
    local = sorted((cluster.runs / "local shards").rglob("*.*"))
    ours = sorted((chain / "shards").rglob("*.*"))
    assert [p.name for p in ours] == [p.name for p in local]
    assert len(ours) > 10
    for one, other in zip(ours, local):
        if one.name != "manifest.json":
            assert one.read_bytes() == other.read_bytes(), one
    tasks = [path.name for path in sorted((chain / "slurm" / "shards").glob("stage-*/state.*"))]
    assert tasks == ["state.0", "state.1"] * 3


@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_two_nodes_train_as_two_local_ranks(cluster: Cluster, chain: Path, stage: str) -> None:
    words, data = (VAE, "shards") if stage == "vae" else (LDM, "latents")
    run = cluster.runs / f"local {stage}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", f"launch.train_{stage}", *words, f"data.shards={chain}/{data}", f"run_dir={run}"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=200, capture_output=True)
    assert_same_weights(chain / stage, run)
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2


# --- told to stop ----------------------------------------------------------------------------------------------------


def assert_went_on(run: Run, undisturbed: Path, n_stops: int = 1) -> None:
    assert run.ends() == "DONE", run.log
    what = [event for event, _, _ in run.events()]
    assert what == ["start", *["stop", "start"] * n_stops]
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
    assert_went_on(run, chain / "vae")
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
    out = cluster.runs / "failing"
    words = ["vae=none", "shards=none", "threads=7", f"out={out}", "--nodes", "2", "--preflight", "false"]
    submit.main(submit.read(["encode", *words]))
    notes = Path(f"{out}.slurm")
    wait_for(lambda: state_of(notes).state in ("FAILED", "REQUEUED"), 90, lambda: (notes / "log.txt").read_text())
    assert state_of(notes).state == "FAILED"
    assert state_of(notes).reason == "exit code 1: rank 1 on sim2: KeyError: 7"


@pytest.mark.exhaustive  # a unit test has it without Slurm
def test_a_cancelled_job_leaves_nothing_on_the_nodes(cluster: Cluster, chain: Path) -> None:
    """Slurm starts no step for it any more, and gives it three seconds."""
    run = Run(cluster, "cancelled", chain / "shards", "--nodes", "2", "--preflight", "false", "--stage")
    run.reaches(5)
    assert not nothing_is_staged(cluster)
    cluster.call("scancel", run.job)
    wait_for(lambda: slurm.job_states()[run.job][0] == "CANCELLED", 60, lambda: run.log)
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
    assert_went_on(run, chain / "vae")


def test_a_loop_without_progress_ends(cluster: Cluster, chain: Path) -> None:
    run = Run(cluster, "loop", chain / "shards", "--nodes", "2", "--preflight", "false")
    for start in (1, 2):
        wait_for(lambda: f"(start {start}," in run.log, 120, lambda: run.log)  # noqa: B023
        cluster.call("scancel", "--batch", "--signal=USR1", run.job)
    assert run.ends() == "FAILED"
    assert "no progress since the last requeue (still at 0)" in run.log
    assert run.events() == [("start", 0, 0), ("stop", 0, 0), ("start", 1, 0), ("stop", 1, 0)]


# --- nodes -----------------------------------------------------------------------------------------------------------


def test_a_lost_node_is_done_without(cluster: Cluster, chain: Path) -> None:
    """Two nodes, one of which dies; the other two are not to be had. What follows runs on one."""
    cluster.call("scontrol", "update", "nodename=sim[3-4]", "state=drain", "reason=test")
    try:
        run = Run(cluster, "lost", chain / "shards", "train.save_every=5", "--nodes", "1-2")
        run.reaches(11)
        cluster.crash(2)
        assert run.ends() == "DONE", run.log
        assert "preflight of 1 nodes" in run.log
        (_, second) = [event for event in run.events() if event[0] == "start"]
        assert second[2] >= 10
        # on one node sums are rounded otherwise, which AdamW makes steps of in weights without a gradient to speak of;
        # other cells, or the same in another order, would show in the second digit
        for split, metric in (("train", "loss"), ("validation", "nll")):
            ours, theirs = curve(run.folder, split, metric), curve(chain / "vae", split, metric)
            assert ours.keys() == theirs.keys()
            assert all(abs(value / theirs[step] - 1) < 1e-5 for step, value in ours.items()), (split, ours, theirs)
    finally:
        cluster.revive(2)
        cluster.call("scontrol", "update", "nodename=sim[3-4]", "state=resume")
        wait_for(lambda: cluster.call("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "4", 60)
        cluster.call("srun", "--partition=high", "--nodes=4", "true")  # idle a moment before it is given to jobs


PLANTED = """
import importlib.metadata, platform, time
if platform.node() == "sim2":
    found = importlib.metadata.version
    importlib.metadata.version = lambda name: "0.0.1" if name == "numpy" else found(name)
if platform.node() == "sim3":
    import torch
    product = torch.Tensor.__matmul__
    def slow(a, b):
        time.sleep(0.05)
        return product(a, b)
    torch.Tensor.__matmul__ = slow
"""


def test_preflight_finds_planted_nodes(
    cluster: Cluster, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One node has another numpy, one is slow: the run goes on without them, its shards on the others' own disks."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    run = Run(cluster, "planted", chain / "shards", "--nodes", "2-4", "--stage")
    assert run.ends() == "DONE", run.log
    report = json.loads((run.notes / "preflight.json").read_text())
    troubles = {row["node"]: row["troubles"] for row in report["nodes"]}
    assert troubles["sim1"] == troubles["sim4"] == []
    assert troubles["sim2"][0].startswith("numpy is 0.0.1, on other nodes ")
    assert troubles["sim3"][0].startswith("slow: a matrix product takes ")
    assert report["use"] == ["sim1", "sim4"]
    assert report["seconds"] < 60
    assert_same_weights(run.folder, chain / "vae")
    # each node once, and nothing is left
    assert run.log.count(": staged ") == 2
    assert list((cluster.folder / "disks").glob("*/*")) == []
    # the next submission does without them
    capsys.readouterr()
    submit.main(submit.read([*run.words, "--nodes", "2", "--dry-run"]))
    assert "#SBATCH --exclude=sim2,sim3\n" in capsys.readouterr().out


DYING = """
import os, platform, shutil, signal, time
if platform.node() == "sim2":
    shutil.disk_usage = lambda path: time.sleep(600)
if platform.node() == "{dies}":
    import torch
    torch.Tensor.__matmul__ = lambda a, b: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.exhaustive  # waits for ranks until they are missed
@pytest.mark.parametrize("dies", ["sim3", "sim1"])
def test_preflight_names_ranks_that_give_no_result(
    cluster: Cluster, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """One hangs over its folders, one dies; the job goes on without them, unless it is the first one, which leads."""
    (tmp_path / "sitecustomize.py").write_text(DYING.format(dies=dies))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    run = Run(cluster, f"missing {dies}", chain / "shards", "--nodes", "1-4")
    assert run.ends() == ("DONE" if dies == "sim3" else "FAILED"), run.log
    bad = dict(line.split("\t")[::2] for line in (run.notes / "bad_nodes").read_text().splitlines())
    if dies == "sim1":
        assert bad == {"sim1": "its first rank gave no report in preflight"}
        return
    assert bad == {
        "sim2": "rank 1 hangs: it looks at its folders",
        "sim3": "rank 2 died or froze: it computes a matrix product",
    }
    report = json.loads((run.notes / "preflight.json").read_text())
    assert report["use"] == ["sim1", "sim4"]
    assert report["seconds"] < 60


def test_gpus_that_are_not_there(
    cluster: Cluster, chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Slurm counts two GPUs a node that nobody has; three it does not even count."""
    site = cluster.folder / "gpus.sh"
    text = (cluster.folder / "site.sh").read_text()
    monkeypatch.setenv("SCLDM_SITE", str(site))
    site.write_text(text.replace("GPUS_PER_NODE=0", "GPUS_PER_NODE=3"))
    words = ["train", "vae", *VAE, f"data.shards={chain}/shards", f"run_dir={cluster.runs}/gpus"]
    assert main(["submit", *words]) == 2
    assert "SCLDM_GPUS_PER_NODE=3: a node of partition low has 2 GPUs" in capsys.readouterr().err
    site.write_text(text.replace("GPUS_PER_NODE=0", "GPUS_PER_NODE=2"))
    run = Run(cluster, "gpus", chain / "shards")
    assert run.ends() == "FAILED"
    assert "FAILED: preflight: on every node: 0 GPUs are there, not 2; see preflight.json" in run.log
    assert (run.notes / "bad_nodes").read_text() == ""  # the setting is wrong, not the node


def test_a_run_folder_that_is_not_shared(cluster: Cluster, chain: Path) -> None:
    """The site calls a folder shared that is each node's own: preflight finds the node that does not see it.

    Where not even the job's first node has it, Slurm can't open the log.
    """
    place = cluster.folder / "disk" / "run"
    (cluster.folder / "disks" / "sim1" / "run" / "slurm").mkdir(parents=True)
    words = ["train", "vae", *VAE, f"data.shards={chain}/shards", f"run_dir={place}", "--nodes", "2"]
    submit.main(submit.read(words))
    notes = cluster.folder / "disks" / "sim1" / "run" / "slurm"
    wait_for(lambda: (notes / "state").exists() and (notes / "state").read_text().startswith("FAILED"), 60)
    first, second = json.loads((notes / "preflight.json").read_text())["nodes"]
    assert (first["node"], first["troubles"]) == ("sim1", [])
    assert second["troubles"] == [f"{place}/slurm: what the first node writes there is not seen here"]

    elsewhere = cluster.folder / "disk" / "elsewhere"
    submit.main(submit.read([*words[:-3], f"run_dir={elsewhere}", "--nodes", "2"]))
    wait_for(lambda: state_of(elsewhere / "slurm").state == "FAILED", 60)
    assert "is its folder seen from every node?" in state_of(elsewhere / "slurm").reason


def test_status_and_logs(cluster: Cluster, chain: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["status", str(chain / "vae")]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["state"].startswith("DONE, job ")
    assert told["step"].startswith("40 of 40 (100.0 %)")
    assert told["checkpoint"].startswith("step 40, ")
    assert main(["logs", str(chain / "vae")]) == 0
    assert capsys.readouterr().out == (chain / "slurm" / "vae" / "log.txt").read_text()
