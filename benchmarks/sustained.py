"""One run on a real Slurm of this host that is disturbed several times, beside the same run that nothing disturbs.

The Slurm is that of the tests (tests/slurm/cluster.sh): two nodes of one rank each. A rank is killed, the job is
preempted, a node is lost so that one rank goes on, and the node comes back.

Reading order: SustainedConfig, main, train, disturb, Watch, ranks_of.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.report import Report, run_benchmark
from benchmarks.sustained_report import NAMES, Sample, draw, rows
from launch.cluster import submit
from launch.cluster.notes import ENDED, state_of
from scldm.errors import InputError
from scldm.train.tracking import read_metrics

PURPOSE = """Train on two Slurm ranks through a kill -9, a preemption and a changed number of ranks, and compare losses,
memory and CPU time with the same run undisturbed. Needs root and Slurm's packages (tests/slurm/cluster.sh install)."""
EXAMPLE = """
python -m benchmarks.sustained shards=shards out=runs/sustained words=vae/20m,hardware/cpu,train.steps=400 \\
  kill_at=50 preempt_at=150 lose_at=250 return_at=300
"""
CLUSTER = str(Path(__file__).resolve().parent.parent / "tests" / "slurm" / "cluster.sh")


@dataclass(frozen=True)
class SustainedConfig:
    """What to train, and when to disturb it.

    shards: to train on
    out: folder of both runs, of their Slurms and of samples. A path without blanks
    words: presets and keys of `scldm train vae`. Losses are compared where train.log_every logs them
    kill_at: step at which a rank gets SIGKILL
    preempt_at: step at which a job of a higher partition takes both nodes
    lose_at: step at which the second node loses its power, so that one rank goes on
    return_at: step at which that node is back, and the job is preempted once more, so that two ranks go on
    run: which run to make, `none` for the table alone. Each has its own Slurm, so both can be made at the same time
    every_s: seconds between two samples of memory and CPU time
    figure: a PNG of losses, rates and memory is drawn there
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    shards: str
    out: str
    words: tuple[str, ...] = ("vae/20m", "hardware/cpu")
    kill_at: int = 50
    preempt_at: int = 150
    lose_at: int = 250
    return_at: int = 300
    run: Literal["both", "disturbed", "undisturbed", "none"] = "both"
    every_s: float = 2.0
    figure: str = ""
    json: bool = False
    save: str = ""


CONFIG = SustainedConfig


def main(config: SustainedConfig) -> Report:
    """Print the table; returns it. Raises: InputError where Slurm can't be started here, or a run fails."""
    if why_not := call("bash", CLUSTER, "why-not"):
        raise InputError(f"benchmarks.sustained needs a Slurm of its own: {why_not}")
    out = Path(config.out).resolve()
    for name in NAMES:
        if config.run in ("both", name):
            train(config, out, name)
    if not all(Path(f"{out / name}.samples.jsonl").exists() for name in NAMES):
        raise InputError(f"out={out}: both runs are compared, and only one is there")
    report = Report("sustained", {"words": " ".join(config.words)}, save=config.save)
    for row in rows(out):
        report.add(row)
    if config.figure:
        draw(out, Path(config.figure))
    report.print(config.json)
    return report


def call(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def train(config: SustainedConfig, out: Path, name: str) -> None:
    slurm = out / f"slurm-{name}"
    slurm.mkdir(parents=True, exist_ok=True)
    site = {"PARTITION": "low", "GPUS_PER_NODE": 0, "TASKS_PER_NODE": 1, "CPUS_PER_TASK": 1, "SHARED": out}
    (slurm / "site.sh").write_text("".join(f"SCLDM_{key}={value}\n" for key, value in site.items()))
    os.environ |= {"SLURM_CONF": str(slurm / "slurm.conf"), "SCLDM_SITE": str(slurm / "site.sh")}
    call("bash", CLUSTER, "start", str(slurm), "2")
    try:
        watch = Watch(config, out, name)
        if name == "disturbed":
            disturb(config, slurm, watch)
        watch.until_the_end()
    finally:
        call("bash", CLUSTER, "stop", str(slurm))


def disturb(config: SustainedConfig, slurm: Path, watch: Watch) -> None:
    preemption = ("srun", "--partition=high", "--nodes=2", "--exclusive", "true")
    watch.until(config.kill_at)
    watch.note("kill -9 of rank 1")
    os.kill(next(sample.pid for sample in watch.look() if sample.rank == 1), signal.SIGKILL)
    watch.until(config.preempt_at)
    watch.note("preemption")
    with subprocess.Popen(preemption):
        watch.until(config.lose_at)
    watch.note("node lost, 2 ranks to 1")
    call("bash", CLUSTER, "crash", str(slurm), "2")
    watch.until(config.return_at)
    watch.note("node back, 1 rank to 2")
    call("bash", CLUSTER, "revive", str(slurm), "2")
    with subprocess.Popen(preemption):
        watch.until_the_end()


class Watch:
    """A run as a job, and samples of its ranks in OUT/NAME.samples.jsonl, disturbances in OUT/NAME.events.jsonl."""

    def __init__(self, config: SustainedConfig, out: Path, name: str) -> None:
        self.config, self.folder, self.base = config, out / name, out / name
        words = [
            "train",
            "vae",
            *config.words,
            f"data.shards={Path(config.shards).resolve()}",
            f"run_dir={self.folder}",
        ]
        nodes = ("--nodes", "1-2" if name == "disturbed" else "2")
        (self.job,) = submit.main(submit.read([*words, *nodes]))
        self.began = time.monotonic()

    @property
    def step(self) -> int:
        return max([row["step"] for row in read_metrics(self.folder, "train")], default=0)

    def look(self) -> list[Sample]:
        """Its ranks as they are now."""
        now, step = time.monotonic() - self.began, self.step
        return [Sample(round(now, 1), step, *found) for found in ranks_of(self.job)]

    def note(self, what: str) -> None:
        with open(f"{self.base}.events.jsonl", "a") as file:
            file.write(
                json.dumps({"t": round(time.monotonic() - self.began, 1), "step": self.step, "what": what}) + "\n"
            )

    def until(self, step: int | None) -> None:
        while step is None or self.step < step:
            with open(f"{self.base}.samples.jsonl", "a") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in self.look())
            state = state_of(self.folder / "slurm")
            if state.state in ENDED:
                if step is None and state.state in ("DONE", "STOPPED"):
                    return
                raise InputError(f"{self.folder.name}: {state.state} at step {self.step}: {state.reason}")
            time.sleep(self.config.every_s)

    def until_the_end(self) -> None:
        self.until(None)


def ranks_of(job: str) -> Iterator[tuple[int, int, float, float]]:
    """(rank, pid, resident GB, CPU seconds) of those of a job that train."""
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            lines = (folder / "environ").read_bytes().split(b"\0")
            environment = {name: value for name, _, value in (line.partition(b"=") for line in lines)}
            if not {b"launch.cli", b"train"} <= set(words) or environment.get(b"SLURM_JOB_ID") != job.encode():
                continue
            if b"python" not in words[0]:
                continue  # the shell that started it
            times = (folder / "stat").read_text().rpartition(")")[2].split()
            memory = int((folder / "statm").read_text().split()[1]) * page / 1e9
        except (OSError, IndexError):
            continue  # it ended while we looked
        if rank := environment.get(b"SLURM_PROCID"):
            yield int(rank), int(folder.name), round(memory, 4), (int(times[11]) + int(times[12])) / tick


if __name__ == "__main__":
    sys.exit(run_benchmark("sustained"))
