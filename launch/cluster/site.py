"""What a site's Slurm is like: `SCLDM_KEY=value` lines of a file, `slurm/site.sh` or the one that $SCLDM_SITE names.

One grammar, for `scldm submit` and for jobs that are sent with sbatch. It is a part of the shell's, and nothing is run:

    SCLDM_KEY=word            one key a line. `#` begins a comment, at the start of a line or after a blank
    SCLDM_KEY="two words"     blanks and `#` need quotes, "" or ''
    SCLDM_KEY=~/x/$USER       ~, $HOME and $USER are filled in, but not between ''. Any other $ is refused

`python -m launch.cluster.site` prints the file for a shell.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from scldm.errors import REFUSED, InputError, read_text

# key -> what it says. A site gives those that it needs
KEYS = {
    "SCLDM_PARTITION": "partition",
    "SCLDM_CPU_PARTITION": "partition of jobs that want no GPU, as shards write. By default the same",
    "SCLDM_ACCOUNT": "account",
    "SCLDM_QOS": "quality of service",
    "SCLDM_TIME": "time limit of a job, as 24:00:00",
    "SCLDM_GPUS_PER_NODE": "GPUs of a node, as 8 or a100:8: as many ranks run there. 0 on nodes without",
    "SCLDM_TASKS_PER_NODE": "ranks on a node without GPUs",
    "SCLDM_CPUS_PER_TASK": "CPU cores of a rank, bound to it. By default the node's, shared out evenly",
    "SCLDM_MEMORY": "memory of a node, as 0 for all of it, or 200G",
    "SCLDM_MODULES": "environment modules to load, separated by spaces",
    "SCLDM_PYTHON": "the Python that has scldm, by default that of the submitting shell",
    "SCLDM_JOB_PYTHON": "with a container, a Python outside of it that has scldm, to run the job's steps",
    "SCLDM_CONTAINER": "image of a container that the ranks run in, as its runtime names images",
    "SCLDM_CONTAINER_RUNTIME": "what runs it: pyxis (by default), apptainer, singularity or podman",
    "SCLDM_CONTAINER_MOUNTS": "its mounts, as /lustre,/data:/data:ro",
    "SCLDM_IMAGE_S": "seconds in which a node has to have the image, by default 1800. 0 for no limit",
    "SCLDM_SCRATCH": "folder on a node's local disk, for staged shards",
    "SCLDM_SHARED": "folders that all nodes see, separated by colons. Run folders lie below one of them",
}
FOR_SBATCH = (*("SCLDM_PARTITION", "SCLDM_CPU_PARTITION", "SCLDM_ACCOUNT", "SCLDM_QOS", "SCLDM_TIME", "SCLDM_MEMORY"),)
NUMBER, GPUS = r"\d+", r"(?:([\w.-]+):)?(\d+)"
NUMBERS = {
    "SCLDM_GPUS_PER_NODE": GPUS,
    **dict.fromkeys(("SCLDM_TASKS_PER_NODE", "SCLDM_CPUS_PER_TASK", "SCLDM_IMAGE_S"), NUMBER),
}
# SCLDM_NCCL_X=value sets NCCL_X on the nodes. NCCL has too many variables for a list that stays true
PASSED_ON = ("SCLDM_NCCL_", "SCLDM_GLOO_", "SCLDM_UCX_", "SCLDM_FI_")


def site_path() -> Path:
    """$SCLDM_SITE, else slurm/site.sh. Raises: InputError where $SCLDM_SITE names no file."""
    from launch.config import shipped  # late: a job's steps have none of its packages

    named = os.environ.get("SCLDM_SITE", "")
    path = Path(named) if named else shipped("slurm") / "site.sh"
    if not path.is_file():
        raise InputError(f"SCLDM_SITE={named}: no such file" if named else f"{path}: no such file")
    return path


def read_site(path: Path) -> dict[str, str]:
    """The keys that a site file sets to something.

    Raises: InputError with the line, for an unknown key, a second value, or what is not of the grammar.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        line, where = line.strip(), f"{path}, line {number}"
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\w+)=(.*)", line)
        if not match:
            raise InputError(f"{where}: {line!r} is no SCLDM_KEY=value line")
        key, text = match.groups()
        if key not in KEYS and not (key.startswith(PASSED_ON) and not key.endswith("_")):
            near = difflib.get_close_matches(key, KEYS, n=2, cutoff=0.6)
            raise InputError(
                f"{where}: unknown key {key}. {'Did you mean' if near else 'There are'} {', '.join(near or KEYS)}"
            )
        if key in found:
            raise InputError(f"{where}: {key} is given twice")
        found[key] = _value(text, f"{where}: {key}={text}")
        if key in NUMBERS and found[key] and not re.fullmatch(NUMBERS[key], found[key]):
            typed = ", or a type and a number as a100:8" if NUMBERS[key] == GPUS else ""
            raise InputError(f"{where}: {key}={found[key]!r} must be a whole number{typed}")
    return {key: value for key, value in found.items() if value}


def _value(text: str, where: str) -> str:
    match = re.fullmatch(r"""(?:"([^"]*)"|'([^']*)'|([^\s"'#][^\s"']*)?)(?:\s+#.*|\s*)""", text)
    if not match:
        raise InputError(f"{where}: write one word, or put the value into quotes. A comment begins with a blank and #")
    if match[2] is not None:
        return match[2]
    value = match[1] or match[3] or ""
    if value == "~" or value.startswith("~/"):
        value = f"$HOME{value[1:]}"
    value = re.sub(r"\$(?:(HOME|USER)\b|\{(HOME|USER)\})", lambda name: _variable(name[1] or name[2], where), value)
    if re.search(r"[$`\\]|^~", value):
        raise InputError(f"{where}: only ~, $HOME and $USER are filled in. Write the value itself, or put it into ''")
    return value


def _variable(name: str, where: str) -> str:
    if not os.environ.get(name):
        raise InputError(f"{where}: ${name} is not set in this shell")
    return os.environ[name]


def gpus_of_node(site: Mapping[str, str]) -> tuple[str, int]:
    """Type and number of a node's GPUs: of `a100:8` both, of `8` no type."""
    match = re.fullmatch(GPUS, site.get("SCLDM_GPUS_PER_NODE") or "0")
    if not match:  # of a job's environment: site files were checked when they were read
        raise InputError(f"SCLDM_GPUS_PER_NODE={site['SCLDM_GPUS_PER_NODE']!r}: give a number, or a type too: a100:8")
    return match[1] or "", int(match[2])


def for_nodes(site: Mapping[str, str]) -> dict[str, str]:
    """The site's settings as a job's script has them, with the Python of its ranks and that of its own steps."""
    ranks = site.get("SCLDM_PYTHON") or ("python" if "SCLDM_CONTAINER" in site else sys.executable)
    steps = site.get("SCLDM_JOB_PYTHON") or (sys.executable if "SCLDM_CONTAINER" in site else ranks)
    found = {key: value for key, value in site.items() if key not in FOR_SBATCH}
    return {**found, "SCLDM_PYTHON": ranks, "SCLDM_JOB_PYTHON": steps}


def exports(settings: Mapping[str, str]) -> str:
    return "".join(f"export {key}={shlex.quote(value)}\n" for key, value in settings.items())


def main() -> int:
    """Print the settings of a job that was sent with sbatch. What its environment says goes before the site file."""
    try:
        site = read_site(site_path())
    except InputError as error:
        print(f"scldm: error: {error}", file=sys.stderr)
        return REFUSED
    given = {key: value for key, value in os.environ.items() if value and (key in KEYS or key.startswith(PASSED_ON))}
    print(exports(for_nodes(site | given)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
