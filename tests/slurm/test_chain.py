"""The whole path as a chain of jobs on a real Slurm: what it makes, and what becomes of it where a link fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.cluster import commands as slurm
from launch.cluster import submit
from launch.cluster.notes import state_of
from tests.slurm.runs import LDM, ROOT, VAE, Cluster, assert_same_weights, chain_log, wait_for

pytestmark = pytest.mark.slow


def test_the_chain_makes_everything(chain: Path, capsys: pytest.CaptureFixture) -> None:
    assert json.loads((chain / "evaluation" / "evaluation.json").read_text())
    assert main(["status", str(chain)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["DONE"] * 10


def test_each_link_asks_slurm_for_what_it_was_given(cluster: Cluster) -> None:
    """As Slurm itself tells of the jobs that wait."""
    words = ["vae/tiny", "ldm/tiny", "hardware/cpu", f"shards.source.paths={cluster.runs}/cells.h5ad", "generate.n=9"]
    words += [f"out={cluster.runs}/resources", "--tasks", "3", "--at-once", "2", "--time", "50", "--nodes", "2"]
    words += [
        "vae.--cpus-per-task=2",
        "ldm.--time=55",
        "ldm.--nodes=1",
        "evaluate.--partition=high",
        "export.--mem=100",
    ]
    ids = submit.main(submit.read(["pipeline", *words, "--", "--hold"]))
    keys = ("Partition", "TimeLimit", "NumNodes", "NumCPUs", "MinMemoryNode", "ArrayTaskThrottle")
    told = {}
    for job in ids:
        assert slurm.job_state(job) == ("PENDING", "JobHeldUser")
        found = dict(re.findall(r"(\w+)=(\S*)", slurm.call("scontrol", "--oneliner", "show", "job", job)))
        told[found["JobName"]] = tuple(found.get(key, "").removesuffix("-1") for key in keys)
    slurm.call("scancel", *ids)
    usual = ("low", "00:50:00", "1", "1", "0", "")
    assert {name: of for name, of in told.items() if of != usual} == {
        **{f"shards-{k}": (*usual[:-1], "2") for k in (1, 2, 3)},
        "vae": ("low", "00:50:00", "2-2", "4", "0", ""),
        "encode": ("low", "00:50:00", "2-2", "2", "0", ""),
        "ldm": ("low", "00:55:00", "1", "1", "0", ""),
        "export": ("low", "00:50:00", "1", "1", "100M", ""),
        "generate": ("low", "00:50:00", "2-2", "2", "0", ""),
        "evaluate": ("high", "00:50:00", "1", "1", "0", ""),
    }
    assert (slurm.job_state("99999"), slurm.accounted("99999")) == (None, None)
    partition = slurm.partitions()["low"]  # of nodes with two CPUs and two GPUs
    assert [partition.cpus_of_rank("", gpus, 1) for gpus in (0, 1)] == [2, 1]


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
    wait_for(lambda: slurm.job_state(ids[-1])[0] == "CANCELLED", 90, lambda: chain_log(out))
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


def test_an_array_writes_the_shards_of_a_local_run(chain: Path, shards: Path) -> None:
    local = sorted(shards.rglob("*.*"))
    ours = sorted((chain / "shards").rglob("*.*"))
    assert [p.name for p in ours] == [p.name for p in local]
    assert len(ours) > 10
    for one, other in zip(ours, local):
        if one.name != "manifest.json":
            assert one.read_bytes() == other.read_bytes(), one
    tasks = [path.name for path in sorted((chain / "slurm" / "shards").glob("stage-*/state.*"))]
    assert tasks == ["state.0", "state.1"] * 3


def test_a_job_that_is_sent_with_sbatch(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the site file and its words itself; where it has no Python for that, its log says so."""
    out = cluster.runs / "by hand"
    words = [str(ROOT / "slurm" / "job.sbatch"), "shards", "write", f"source.paths={cluster.runs}/cells.h5ad"]
    words += ["conditions=cell_type", f"out={out}"]
    for python, said in (("/no/python", "/no/python: No such file or directory"), (sys.executable, "DONE")):
        monkeypatch.setenv("SCLDM_PYTHON", python)
        log = cluster.runs / f"by hand {said[-4:]}.txt"
        sent = subprocess.run(["sbatch", "--wait", f"--output={log}", *words], capture_output=True, timeout=200)
        assert (sent.returncode == 0) == (said == "DONE"), log.read_text()
        assert said in log.read_text()
    assert state_of(Path(f"{out}.slurm")).state == "DONE"
    assert (out / "manifest.json").is_file()


@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_two_nodes_train_as_two_local_ranks(cluster: Cluster, chain: Path, stage: str) -> None:
    words, data = (VAE, "shards") if stage == "vae" else (LDM, "latents")
    run = cluster.runs / f"local {stage}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "launch.cli", "train", stage, *words, f"data.shards={chain}/{data}", f"run_dir={run}"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=200, capture_output=True)
    assert_same_weights(chain / stage, run)
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2


def test_status_and_logs(cluster: Cluster, chain: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["status", str(chain / "vae")]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["state"].startswith("DONE, job ")
    assert told["step"].startswith("40 of 40 (100.0 %)")
    assert told["checkpoint"].startswith("step 40, ")
    assert main(["logs", str(chain / "vae")]) == 0
    assert capsys.readouterr().out == (chain / "slurm" / "vae" / "log.txt").read_text()
