"""What the tests on a real Slurm have in common: its nodes, a run as a job, and how runs are compared."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from launch.cluster import submit
from launch.cluster.notes import state_of
from scldm.train.checkpoint import Checkpoint
from scldm.train.parts import KINDS
from scldm.train.steps import pointed
from scldm.train.tracking import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent

SCRIPT = str(Path(__file__).with_name("cluster.sh"))

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
    latest = pointed(run / "checkpoints" / "latest")
    assert latest is not None
    held = Checkpoint(latest)
    return {f"{kind}/{name}": held.whole(kind, name) for kind in KINDS for name in held.shapes} | held.buffers()


def assert_same_weights(run: Path, other: Path) -> None:
    """To the bit."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0.0, atol=0.0)


def curve(run: Path, split: str, metric: str) -> dict[int, float]:
    """By step."""
    return {row["step"]: row[metric] for row in read_metrics(run, split)}


def chain_log(out: Path) -> str:
    return "\n".join(f"{path}: {path.read_text()[-1500:]}" for path in sorted((out / "slurm").rglob("log*.txt")))
