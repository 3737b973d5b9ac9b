"""`scldm submit`: a verb as a Slurm job. Everything that can be wrong is said before anything is submitted.

The script is slurm/job.sbatch with the settings of this job in place of the site file's. It lies in the notes of the
job, a folder beside what it makes (for a training run, `slurm` in the run folder), with the log and the job's state.

Reading order: SubmitConfig, read, main, checks, the script.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launch import slurm
from launch.cli import VERBS, find_verb
from launch.config import compose, shipped
from launch.site import read_site, site_path
from scldm.errors import InputError
from scldm.train.run_folder import write_json

PURPOSE = """Run a verb as a Slurm job on one or many nodes, one rank per GPU: writes the batch script, submits it,
prints the job's id. `scldm submit pipeline` does so for the whole path, as jobs that follow one another.
The options below are given as --option value; presets and keys are the verb's.
The site's partition, account, GPUs per node and so on stand in slurm/site.sh, or in the file that $SCLDM_SITE names."""
EXAMPLE = """
scldm submit train vae vae/70m data.shards=shards run_dir=runs/vae --nodes 8
scldm submit train vae vae/70m data.shards=shards run_dir=runs/vae --nodes 2-8 --dry-run -- --exclusive
scldm submit shards write data/census out=shards --tasks 16
"""
# a verb whose ranks share its work: one per GPU on every node; and those that want one GPU. The others want none
ON_ALL_RANKS = ("train vae", "train ldm", "encode")
ON_ONE_GPU = ("generate",)
NOT_AS_A_JOB = ("submit", "status", "logs", "quickstart")
THE_JOB = "# --- the job ---"  # in slurm/job.sbatch, above it are the settings
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs", "squashfs")
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


@dataclass(frozen=True)
class SubmitConfig:
    """How a job runs; given as --option value. All other words are the verb's.

    nodes: nodes, or MIN-MAX: as many as are free, and fewer where one is lost
    tasks: `shards write` alone: tasks that share the work as arrays, before a closing job
    warn_s: seconds before the time limit at which the job saves, stops and goes back to the queue
    max_requeues: how often it may go back to the queue; it never does twice without progress
    preflight: check the nodes before the first rank starts
    stage: copy the shards to each node's own disk (the site's SCLDM_SCRATCH) first
    dry_run: print the script; submit nothing
    """

    nodes: str = "1"
    tasks: int = 1
    warn_s: int = 300
    max_requeues: int = 50
    preflight: bool = True
    stage: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.nodes)
        if not match or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise InputError(f"--nodes {self.nodes}: give a number of nodes, or MIN-MAX as 2-8")
        if not 1 <= self.warn_s <= 65_535:
            raise InputError(f"--warn-s {self.warn_s} must be from 1 to 65535")
        for name in ("tasks", "max_requeues"):
            if getattr(self, name) < (name == "tasks"):
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} is too few")

    @property
    def least(self) -> int:
        return int(self.nodes.split("-")[0])

    @property
    def most(self) -> int:
        return int(self.nodes.split("-")[-1])


CONFIG = SubmitConfig
USAGE = "scldm submit VERB [PRESET ...] [key=value ...] [--option value ...] [-- SBATCH ARGUMENTS]"


class Submission(NamedTuple):
    """A command line of submit: its own options, the verb with its words, the words for sbatch."""

    options: SubmitConfig
    verb: str
    words: list[str]
    sbatch: list[str]


class Job(NamedTuple):
    """One job to be: a verb with its words, where its notes lie, and what it asks of Slurm."""

    name: str
    verb: str
    words: list[str]
    notes: Path
    options: SubmitConfig
    array: int = 0  # tasks; 0 is no array


def read(words: Sequence[str]) -> Submission:
    """Take a command line apart. Raises: InputError, also for what the verb itself would refuse."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    own, rest = own_options(words[:end])
    options = compose(SubmitConfig, own)
    if rest[:1] == ["pipeline"]:
        verb, rest = "pipeline", rest[1:]
    else:
        verb, rest = find_verb(rest)
        if verb is None or verb.split()[0] in NOT_AS_A_JOB:
            raise InputError(
                f"name a verb that can run as a job: {', '.join(['train vae', 'encode', 'pipeline'])}, ..."
            )
        compose(importlib.import_module(VERBS[verb][0]).CONFIG, rest)
    return Submission(options, verb, rest, words[end + 1 :])


def own_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are submit's own options, as key=value, and the others."""
    kinds = {field.name: field.type for field in dataclasses.fields(SubmitConfig)}
    own, rest, left = [], [], list(words)
    while left:
        word = left.pop(0)
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--") or key not in kinds:
            rest.append(word)
            continue
        if not equals and kinds[key] == "bool":
            value = left.pop(0) if left and left[0] in ("true", "false") else "true"
        elif not equals:
            if not left:
                raise InputError(f"{word} needs a value")
            value = left.pop(0)
        own.append(f"{key}={value}")
    return own, rest


def main(submission: Submission) -> list[str]:
    """Submit; returns the ids of the jobs (none for a dry run), the last one's last."""
    from launch.pipeline import jobs_of_pipeline, jobs_of_shards

    options, verb, words, extra = submission
    site = read_site(site_path())
    if verb == "pipeline":
        chain = jobs_of_pipeline(words, options)
    elif verb == "shards write" and options.tasks > 1:
        chain = jobs_of_shards(words, options, notes_of(verb, words))
    else:
        chain = [Job(verb.replace(" ", "-"), verb, words, notes_of(verb, words), options)]
    check_slurm(options, site, extra)
    for job in chain:
        check_notes(job, site)
        for node, why in bad_nodes(job.notes).items():
            print(
                f"left out: {node} ({why}); remove its line from {job.notes / 'bad_nodes'} to use it", file=sys.stderr
            )
    if len(chain) > 1 and not options.dry_run:
        folder = chain[-1].notes.parent
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "chain.json", [str(job.notes) for job in chain])
    ids: list[str] = []
    for job in chain:
        text = script(job, site, extra, bad_nodes(job.notes))
        if options.dry_run:
            print(text)
        else:
            ids.append(submit(job, text, after=ids[-1:]))
    return ids


def submit(job: Job, text: str, after: Sequence[str]) -> str:
    """Write the script and submit it, to run once the job `after` has succeeded; prints and returns the id."""
    job.notes.mkdir(parents=True, exist_ok=True)
    path = job.notes / "job.sbatch"
    path.write_text(text)
    options = [f"--dependency=afterok:{after[0]}", "--kill-on-invalid-dep=yes"] if after else []
    number = slurm.sbatch(path, *options)
    write_json(job.notes / "job.json", {"id": number, "name": job.name, "words": [*job.verb.split(), *job.words]})
    for old in job.notes.glob("state*"):
        old.unlink()
    print(number, flush=True)
    place = f"after {after[0]}; " if after else ""
    print(f"job {number}: {job.name}; {place}script, log and state in {job.notes}", file=sys.stderr)
    return number


# --- checks ---------------------------------------------------------------------------------------------------------


def notes_of(verb: str, words: Sequence[str]) -> Path:
    """Where a job keeps its script, log and state: in the run folder, or beside what the verb makes."""
    config = compose(importlib.import_module(VERBS[verb][0]).CONFIG, words)
    made = getattr(config, "run_dir", "") or getattr(config, "out", "")
    if not made or "://" in made:
        raise InputError(f"scldm submit {verb}: the job's notes need run_dir or out, a folder that all nodes see")
    made = os.path.abspath(made)
    return Path(made) / "slurm" if hasattr(config, "run_dir") else Path(f"{made}.slurm")


def check_slurm(options: SubmitConfig, site: Mapping[str, str], extra: Sequence[str]) -> None:
    """Raises: InputError where there is no Slurm, or the site has no such partition, nodes or GPUs."""
    known = slurm.partitions()
    name = requested("partition", "p", extra) or site.get("SCLDM_PARTITION", "")
    name = name or next((p.name for p in known.values() if p.is_default), "")
    if name not in known:
        told = f"partition {name!r} is unknown" if name else "no partition is given, and Slurm has no default"
        raise InputError(f"SCLDM_PARTITION: {told}; there are: {slurm.listed(sorted(known))}")
    wanted = int(site.get("SCLDM_GPUS_PER_NODE", 0))
    if wanted > known[name].gpus_per_node:
        raise InputError(
            f"SCLDM_GPUS_PER_NODE={wanted}: a node of partition {name} has {known[name].gpus_per_node} GPUs"
        )
    if options.least > known[name].n_nodes:
        raise InputError(f"--nodes {options.nodes}: partition {name} has {known[name].n_nodes} nodes")
    if options.stage and not site.get("SCLDM_SCRATCH"):
        raise InputError("--stage needs SCLDM_SCRATCH in the site file: a folder on each node's own disk")


def requested(name: str, letter: str, words: Sequence[str]) -> str:
    """What the words for sbatch say about an option; empty for nothing."""
    for word, following in zip(words, [*words[1:], ""]):
        if word in (f"--{name}", f"-{letter}"):
            return following
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return ""


def check_notes(job: Job, site: Mapping[str, str]) -> None:
    """Raises: InputError where not every node sees the folder, or a job of the same run still waits or runs."""
    folder = job.notes.parent.resolve()
    shared = [Path(place).resolve() for place in site.get("SCLDM_SHARED", "").split(":") if place]
    if shared and not any(folder.is_relative_to(place) for place in shared):
        raise InputError(f"{folder} is not below a folder that all nodes see: SCLDM_SHARED={site['SCLDM_SHARED']}")
    if not shared:
        scratch = [site["SCLDM_SCRATCH"]] if "SCLDM_SCRATCH" in site else []
        local = next((p for p in (*LOCAL_FOLDERS, *scratch) if folder.is_relative_to(p)), "")
        kind = file_system_of(folder)
        if local or kind in LOCAL_FILE_SYSTEMS:
            why = f"below {local}" if local else f"on {kind}"
            raise InputError(
                f"{folder} is {why}, which is each node's own; choose a folder on a shared file system, or name the "
                "shared ones in SCLDM_SHARED"
            )
    before = job.notes / "job.json"
    if before.is_file():
        from scldm.errors import read_json

        number = str(read_json(before)["id"])
        state, _ = slurm.job_states().get(number, ("", ""))
        if state and state not in slurm.ENDED:
            raise InputError(f"{job.notes}: job {number} of this run is {state}; wait for it, or scancel {number}")


def file_system_of(folder: Path) -> str:
    """The type of the file system that holds a folder, which need not exist yet; empty where it can't be known."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        _, place, found = line.split()[:3]
        place = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), place)
        if folder.is_relative_to(place) and len(place) >= len(best):
            best, kind = place, found
    return kind


def bad_nodes(notes: Path) -> dict[str, str]:
    """Node -> why an earlier preflight of this run named it."""
    path = notes / "bad_nodes"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {node: why for node, _, why in (line.split("\t", 2) for line in lines)}


# --- the script -----------------------------------------------------------------------------------------------------


def script(job: Job, site: Mapping[str, str], extra: Sequence[str], bad: Mapping[str, str]) -> str:
    """The batch script of a job: what sbatch reads, the settings, and slurm/job.sbatch from the job on."""
    template = (shipped("slurm") / "job.sbatch").read_text()
    lines = ["#!/bin/bash -l", f"# written by: scldm submit {shlex.join([*job.verb.split(), *job.words])}"]
    lines += [f"#SBATCH {option}" for option in sbatch_options(job, site, bad)]
    if extra:
        lines.append("#SBATCH " + " ".join(quoted(word) for word in extra))
    lines += ["", "# --- settings ---", ""]
    lines += [f"{key}={shlex.quote(value)}" for key, value in settings(job, site).items()]
    lines.append("set -- " + shlex.join([*job.verb.split(), *plain_words(job)]))
    return "\n".join([*lines, "", template[template.index(THE_JOB) :]])


def sbatch_options(job: Job, site: Mapping[str, str], bad: Mapping[str, str]) -> list[str]:
    gpus, n_ranks = int(site.get("SCLDM_GPUS_PER_NODE", 0)), ranks_per_node(site)
    cpus = site.get("SCLDM_CPUS_PER_TASK", "1")
    on_all, array = job.verb in ON_ALL_RANKS, job.array > 0
    # of a range of nodes, Slurm takes the smallest for one task per node
    few = on_all and n_ranks == 1 and job.options.least < job.options.most
    log = str(job.notes).replace("%", "%%") + ("/log-%a.txt" if array else "/log.txt")
    given = {
        "job-name": quoted(job.name),
        "output": quoted(log),
        "nodes": job.options.nodes if on_all else "1",
        **({"mincpus": cpus} if few else {"ntasks-per-node": str(n_ranks if on_all else 1)}),
        "gpus-per-node": str(gpus if on_all else 1) if gpus and (on_all or job.verb in ON_ONE_GPU) else "",
        "cpus-per-task": site.get("SCLDM_CPUS_PER_TASK", "") if on_all else "",
        "array": f"0-{job.array - 1}" if array else "",
        "partition": site.get("SCLDM_PARTITION", ""),
        "account": site.get("SCLDM_ACCOUNT", ""),
        "qos": site.get("SCLDM_QOS", ""),
        "time": site.get("SCLDM_TIME", ""),
        "mem": site.get("SCLDM_MEMORY", ""),
        "exclude": ",".join(bad),
        "signal": f"B:USR1@{job.options.warn_s}",
    }
    return [f"--{key}={value}" for key, value in given.items() if value] + ["--requeue", "--open-mode=append"]


def ranks_per_node(site: Mapping[str, str]) -> int:
    return int(site.get("SCLDM_GPUS_PER_NODE", 0)) or int(site.get("SCLDM_TASKS_PER_NODE", 1))


def settings(job: Job, site: Mapping[str, str]) -> dict[str, str]:
    """The SCLDM_ variables of the script: the site's, those of the job, and the Python."""
    for_sbatch = ("SCLDM_PARTITION", "SCLDM_ACCOUNT", "SCLDM_QOS", "SCLDM_TIME", "SCLDM_MEMORY")
    found = {key: value for key, value in site.items() if key not in for_sbatch}
    python = "python" if "SCLDM_CONTAINER" in site else sys.executable
    return {
        "SCLDM_PYTHON": python,
        **found,
        "SCLDM_NOTES": str(job.notes),
        "SCLDM_PREFLIGHT": "on" if job.options.preflight else "off",
        "SCLDM_STAGE": "on" if job.options.stage and staged(job) else "off",
        "SCLDM_MAX_REQUEUES": str(job.options.max_requeues),
        "SCLDM_MIN_NODES": str(job.options.least),
    }


def staged(job: Job) -> bool:
    return job.verb in ON_ALL_RANKS


def plain_words(job: Job) -> list[str]:
    """The verb's words with every key as key=value, and what it makes as a path that does not depend on the folder."""
    from launch.config import split_arguments

    schema: Any = importlib.import_module(VERBS[job.verb][0]).CONFIG
    presets, overrides = split_arguments(schema, job.words)
    for key in ("run_dir", "out"):
        overrides = [
            f"{key}={os.path.abspath(word.partition('=')[2])}" if word.startswith(f"{key}=") else word
            for word in overrides
        ]
    return [*presets, *overrides]


def quoted(word: str) -> str:
    """A word as sbatch reads it in a script's #SBATCH lines."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' if re.search(r"[\s'\"\\#]", word) else word
