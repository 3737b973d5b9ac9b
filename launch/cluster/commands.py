"""What is asked of Slurm's own commands: partitions, jobs, submission. Every call ends within a minute.

Reading order: is_here, call, partitions, job_states, sbatch.
"""

from __future__ import annotations

import re
import shutil
import subprocess
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
    """A partition: its nodes, and the most GPUs that one of them has."""

    name: str
    nodes: frozenset[str]
    gpus_per_node: int
    is_default: bool


def is_here(command: str = "squeue") -> bool:
    return shutil.which(command) is not None


def call(*words: str) -> str:
    """What a command of Slurm prints. Raises: InputError with its own words where it fails, or is not there."""
    if not is_here(words[0]):
        raise InputError(f"there is no Slurm on this machine ({words[0]} is not on the PATH); submit from a login node")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise InputError(f"{words[0]} gave no answer within a minute; is Slurm's controller up?") from None
    if done.returncode:
        told = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise InputError(told if told.startswith(words[0]) else f"{words[0]}: {told}")
    return done.stdout


def partitions() -> dict[str, Partition]:
    found: dict[str, Partition] = {}
    for line in call("sinfo", "--noheader", "--Node", "--format=%P|%N|%G").splitlines():
        name, node, gres = line.strip().split("|")
        name, is_default = name.rstrip("*"), name.endswith("*")
        gpus = sum(int(n) for n in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres))
        before = found.get(name, Partition(name, frozenset(), 0, is_default))
        found[name] = Partition(name, before.nodes | {node}, max(before.gpus_per_node, gpus), is_default)
    return found


def job_states() -> dict[str, tuple[str, str]]:
    """Job id -> (state, reason) of every job that the controller knows; of an array, a task that waits or runs."""
    lines = call("squeue", "--noheader", "--states=all", "--format=%F|%T|%r").splitlines()
    found: dict[str, tuple[str, str]] = {}
    for job, state, reason in (line.split("|", 2) for line in lines):
        if job not in found or found[job][0] in ENDED:
            found[job] = (state, reason)
    return found


def sbatch(script: Path, *options: str) -> str:
    """Submit a script; returns the job's id."""
    return call("sbatch", "--parsable", *options, str(script)).strip().split(";")[0]


def listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "none"
