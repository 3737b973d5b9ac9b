"""One Slurm of four nodes on this host for all of this folder, and what its tests start from."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import pytest

from launch.cli import main
from launch.cluster import submit
from launch.cluster.notes import state_of
from launch.quickstart import write_builtin_cells
from tests.slurm.runs import ROOT, SCRIPT, TRAIN, VAE, Cluster, chain_log, wait_for


@pytest.fixture(scope="package")
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
        "CPUS_PER_TASK": 1,  # so that jobs share nodes
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
            runs.mkdir()
            write_builtin_cells(runs / "cells.h5ad")
            yield Cluster(folder, runs)
    finally:
        subprocess.run(["bash", SCRIPT, "stop", str(folder)], check=True, timeout=60)


@pytest.fixture(scope="package")
def shards(cluster: Cluster) -> Path:
    """The quickstart's cells, sharded without Slurm."""
    assert main(["shards", "write", *shard_words(cluster), f"out={cluster.runs}/local shards"]) == 0
    return cluster.runs / "local shards"


@pytest.fixture(scope="package")
def chain(cluster: Cluster) -> Path:
    """The quickstart's cells through `scldm submit pipeline` on two nodes, sharding as an array of two."""
    out = cluster.runs / "chain"
    labels = sorted(set(ad.read_h5ad(cluster.runs / "cells.h5ad").obs["cell_type"]))
    (cluster.runs / "wanted.csv").write_text("".join(["cell_type,n_cells\n", *(f"{label},6\n" for label in labels)]))
    words = [*("vae." + word if "=" in word else word for word in VAE), "ldm/tiny", *("ldm." + word for word in TRAIN)]
    words += [f"shards.{word}" for word in shard_words(cluster)]
    words += [f"generate.conditions={cluster.runs}/wanted.csv", "generate.sampler.n_steps=4"]
    words += ["evaluate.conditions=cell_type", "evaluate.tracking.enabled=false", f"out={out}"]
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
