"""What a site's Slurm is like: `SCLDM_KEY=value` lines of a file, `slurm/site.sh` or the one that $SCLDM_SITE names.

The file is read, never run: one line, one key; `#` begins a comment line. slurm/job.sbatch reads it by the same rules.
Reading order: KEYS, read_site.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from pathlib import Path

from launch.config import shipped
from scldm.errors import InputError

# key -> what it says; a site gives those that it needs
KEYS = {
    "SCLDM_PARTITION": "partition",
    "SCLDM_ACCOUNT": "account",
    "SCLDM_QOS": "quality of service",
    "SCLDM_TIME": "time limit of a job, as 24:00:00",
    "SCLDM_GPUS_PER_NODE": "GPUs of a node: as many ranks run there; 0 on nodes without",
    "SCLDM_TASKS_PER_NODE": "ranks on a node without GPUs",
    "SCLDM_CPUS_PER_TASK": "CPU cores of a rank, bound to it",
    "SCLDM_MEMORY": "memory of a node, as 0 for all of it, or 200G",
    "SCLDM_MODULES": "environment modules to load, separated by spaces",
    "SCLDM_PYTHON": "the Python that has scldm; else that of the submitting shell",
    "SCLDM_CONTAINER": "image for srun --container-image (pyxis)",
    "SCLDM_CONTAINER_MOUNTS": "its mounts, as /lustre:/lustre",
    "SCLDM_SCRATCH": "folder on a node's local disk, for staged shards",
    "SCLDM_SHARED": "folders that all nodes see, separated by colons; run folders lie below one of them",
}
NUMBERS = ("SCLDM_GPUS_PER_NODE", "SCLDM_TASKS_PER_NODE", "SCLDM_CPUS_PER_TASK")
# SCLDM_NCCL_X=value sets NCCL_X on the nodes; NCCL has too many variables for a list that stays true
PASSED_ON = ("SCLDM_NCCL_", "SCLDM_GLOO_", "SCLDM_UCX_", "SCLDM_FI_")


def site_path() -> Path:
    """$SCLDM_SITE, else slurm/site.sh. Raises: InputError where $SCLDM_SITE names no file."""
    named = os.environ.get("SCLDM_SITE", "")
    path = Path(named) if named else shipped("slurm") / "site.sh"
    if not path.is_file():
        raise InputError(f"SCLDM_SITE={named}: no such file" if named else f"{path}: no such file")
    return path


def read_site(path: Path) -> dict[str, str]:
    """The keys that a site file sets to something.

    Raises: InputError with the line, for an unknown key, a second value, or what only a shell could make sense of.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line, where = line.strip(), f"{path}, line {number}"
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\w+)=(.*)", line)
        if not match:
            raise InputError(f"{where}: {line!r} is no SCLDM_KEY=value line")
        key, text = match.groups()
        if key not in KEYS and not (key.startswith(PASSED_ON) and not key.endswith("_")):
            near = difflib.get_close_matches(key, KEYS, n=2, cutoff=0.6)
            raise InputError(f"{where}: unknown key {key}; {'did you mean ' if near else ''}{', '.join(near or KEYS)}")
        if key in found:
            raise InputError(f"{where}: {key} is given twice")
        found[key] = _value(text, f"{where}: {key}")
        if key in NUMBERS and found[key] and not re.fullmatch(r"\d+", found[key]):
            raise InputError(f"{where}: {key}={found[key]!r} must be a whole number")
    return {key: value for key, value in found.items() if value}


def _value(text: str, where: str) -> str:
    """One word as a shell would read it, but nothing is expanded."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{where}={text}: {error}") from None
    if len(words) > 1:
        raise InputError(f"{where}={text}: put a value with spaces into quotes")
    if re.search(r"[$`\\]", text):
        raise InputError(f"{where}={text}: nothing is expanded here; write the value itself")
    return words[0] if words else ""
