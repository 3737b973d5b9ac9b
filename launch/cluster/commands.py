"""What is asked of Slurm's own commands: partitions, jobs, submission. Every call ends within a minute."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scldm.errors import InputError

# of a job that neither waits nor runs
ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"),
    *("DEADLINE", "REVOKED", "SPECIAL_EXIT"),
)


class Partition(NamedTuple):
    """A partition.

    nodes: node -> its GPUs by type (in lower case as Slurm compares them), and its CPUs as Slurm counts them
    """

    name: str
    nodes: dict[str, tuple[Counter[str], int]]
    is_default: bool

    def gpus_per_node(self, kind: str = "") -> int:
        """The most that a node has, of one type or of any."""
        return max(n_gpus(gpus, kind) for gpus, _ in self.nodes.values())

    def cpus_of_rank(self, kind: str, gpus: int, n_ranks: int) -> int:
        """A rank's even share of the CPUs, on every node that has so many such GPUs. With GPUs, it is a GPU's share."""
        fit = [(of_node.total(), cpus) for of_node, cpus in self.nodes.values() if n_gpus(of_node, kind) >= gpus]
        return max(1, min(cpus // (n if gpus else n_ranks) for n, cpus in fit))


def n_gpus(gpus: Counter[str], kind: str) -> int:
    return gpus[kind.lower()] if kind else gpus.total()


def is_here(command: str = "squeue") -> bool:
    return shutil.which(command) is not None


def call(*words: str) -> str:
    """What a command of Slurm prints. Raises: InputError with its own words where it fails, or is not there."""
    if not is_here(words[0]):
        raise InputError(f"there is no Slurm on this machine ({words[0]} is not on the PATH). Submit from a login node")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise InputError(f"{words[0]} gave no answer within a minute. Is Slurm's controller up?") from None
    if done.returncode:
        told = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise InputError(told if told.startswith(words[0]) else f"{words[0]}: {told}")
    return done.stdout


def partitions() -> dict[str, Partition]:
    found: dict[str, Partition] = {}
    for line in call("sinfo", "--noheader", "--Node", "--format=%P|%N|%c|%G").splitlines():
        name, node, cpus, gres = line.strip().split("|")
        name, is_default = name.rstrip("*"), name.endswith("*")
        gpus: Counter[str] = Counter()
        for kind, n in re.findall(r"\bgpu(?::([^:,()]+))?:(\d+)", gres):
            gpus[kind.lower()] += int(n)
        found.setdefault(name, Partition(name, {}, is_default)).nodes[node] = (gpus, int(cpus))
    return found


def job_state(job: str) -> tuple[str, str] | None:
    """State and reason of a job, of an array those of a task that waits or runs. None where Slurm has forgotten it."""
    try:
        lines = call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r").splitlines()
    except InputError as error:
        if "Invalid job id" not in str(error):
            raise
        lines = []
    states = [(state, reason) for state, _, reason in (line.partition("|") for line in lines)]
    return min(states, key=lambda told: told[0] in ENDED, default=None)


def accounted(job: str) -> tuple[str, str] | None:
    """The same by Slurm's accounting, which forgets no job. None where there is none. Of an array, the worst task."""
    try:
        told = call("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State,ExitCode")
    except InputError:
        return None
    rows = [(line.split()[0].split("|")[0], line.rpartition("|")[2]) for line in told.splitlines() if line.strip()]
    ended = [(state, f"exit code {code}") for state, code in rows if state in ENDED]  # of `CANCELLED by 1000` one word
    return min(ended, key=lambda row: row[0] == "COMPLETED", default=None)


def sbatch(script: Path, *options: str) -> str:
    """Submit a script. Returns the job's id."""
    return call("sbatch", "--parsable", *options, str(script)).strip().split(";")[0]


def listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "none"
