"""One Slurm job to be, and the batch script that it is submitted as.

The script is slurm/job.sbatch with the settings of this job in place of the site file's. It lies in the notes of the
job, with the log and the job's state. The notes are a folder beside what it makes, or `slurm` in a training run's.

Reading order: SubmitConfig, Job, job_of, site_of_job, script, settings.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launch.cli import config_of, find_verb, made_by
from launch.cluster.site import GPUS, exports, for_nodes, gpus_of_node
from launch.config import shipped
from launch.keys import check_words
from launch.verbs import VERBS
from scldm.checked import Checked, checked
from scldm.errors import InputError

# option of submit -> the key of the site file that it goes before
OF_SITE = {
    "partition": "SCLDM_PARTITION",
    "account": "SCLDM_ACCOUNT",
    "qos": "SCLDM_QOS",
    "time": "SCLDM_TIME",
    "mem": "SCLDM_MEMORY",
    "gpus_per_node": "SCLDM_GPUS_PER_NODE",
    "cpus_per_task": "SCLDM_CPUS_PER_TASK",
}
# verbs whose ranks share the work, one per GPU on every node. Then those that want one GPU. The others want none
ON_ALL_RANKS = ("train vae", "train ldm", "encode", "generate")
ON_ONE_GPU = ("transform", "embed", "reconstruct")
BEGIN, SETTINGS, THE_JOB = "# --- begin ---", "# --- settings", "# --- the job ---"  # the parts of slurm/job.sbatch


@dataclass(frozen=True)
class SubmitConfig(Checked):
    """How a job runs. Its options are given as --option value. All other words are the verb's.

    nodes: nodes, or MIN-MAX: as many as are free, and fewer where one is lost
    partition: as sbatch has it, like the next six. Each goes before the site file's
    account: to charge
    qos: quality of service
    time: limit, as 24:00:00
    mem: of a node, as 200G. 0 is all of it
    gpus_per_node: a number, or a type too, as a100:4. So many ranks run on a node
    cpus_per_task: cores of a rank
    tasks: `shards write` alone: tasks that share the work as arrays, before a closing job
    at_once: tasks of an array that run at the same time. 0 is all
    warn_s: seconds before the time limit at which the job saves, stops and goes back to the queue
    max_failures: how often in a row it may fail without progress. Each time but the last it goes back to the queue.
        What Slurm does (preemption, a lost node, a requeue) is no failure
    preflight: check the nodes before the first rank starts
    preflight_s: seconds that this may take. A rank that is not up after half of them is missing
    stage: copy the shards to each node's own disk (the site's SCLDM_SCRATCH) first
    dry_run: print the script, and submit nothing. It needs no Slurm
    """

    nodes: str = "1"
    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    mem: str = ""
    gpus_per_node: str = ""
    cpus_per_task: str = ""
    tasks: int = checked(1, at_least=1)
    at_once: int = checked(0, at_least=0)
    warn_s: int = checked(300, at_least=1, at_most=65_535)
    max_failures: int = checked(3, at_least=1)
    preflight: bool = True
    preflight_s: int = checked(55, at_least=20, at_most=3_600)
    stage: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.nodes)
        if not match or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise InputError(f"--nodes {self.nodes}: give a number of nodes, or MIN-MAX as 2-8")
        if self.gpus_per_node and not re.fullmatch(GPUS, self.gpus_per_node):
            raise InputError(f"--gpus-per-node {self.gpus_per_node}: give a whole number, or a type too, as a100:4")
        if not re.fullmatch(r"\d*", self.cpus_per_task):
            raise InputError(f"--cpus-per-task {self.cpus_per_task}: give a whole number")

    @property
    def least(self) -> int:
        return int(self.nodes.split("-")[0])

    @property
    def most(self) -> int:
        return int(self.nodes.split("-")[-1])


class Job(NamedTuple):
    """One job to be: a verb with its words and the config that they say, where its notes lie, what it asks of Slurm."""

    name: str
    verb: str
    words: list[str]
    config: Any
    options: SubmitConfig
    notes: Path
    array: int = 0  # tasks. 0 is no array
    parent: str = ""  # folder of the MLflow run that the job's is nested in
    sbatch: Sequence[str] = ()  # further words for sbatch

    @property
    def on_all_ranks(self) -> bool:
        return self.verb in ON_ALL_RANKS

    @property
    def wants_gpus(self) -> bool:
        return self.on_all_ranks or self.verb in ON_ONE_GPU

    @property
    def makes(self) -> str:
        """What the verb makes, a path that does not depend on the folder it is called in."""
        return os.path.abspath(made_by(self.config))

    @property
    def shards(self) -> str:
        """The shard set that each rank reads. Empty for a verb without."""
        place = getattr(self.config, "data", self.config)
        return getattr(place, "shards", "") if self.on_all_ranks else ""


def job_of(verb: str, words: Sequence[str], options: SubmitConfig, notes: Path | None = None, name: str = "") -> Job:
    """The job of a verb's command line. Raises: InputError for all that the verb itself would refuse.

    notes: by default in the run folder, or beside what the verb makes
    """
    check_words(verb, words, there=False)  # before what takes seconds to import
    config = config_of(importlib.import_module(VERBS[verb][0]), words)
    made = made_by(config)
    if not made or "://" in made:
        raise InputError(f"scldm submit {verb}: the job's notes need run_dir or out, a folder that all nodes see")
    made = os.path.abspath(made)
    notes = notes or (Path(made) / "slurm" if hasattr(config, "run_dir") else Path(f"{made}.slurm"))
    return Job(name or verb.replace(" ", "-"), verb, list(words), config, options, notes)


# --- the script -----------------------------------------------------------------------------------------------------


def site_of_job(job: Job, site: Mapping[str, str]) -> dict[str, str]:
    """The site's settings as they are for one job."""
    found = dict(site)
    if not job.wants_gpus:
        found["SCLDM_PARTITION"] = site.get("SCLDM_CPU_PARTITION") or site.get("SCLDM_PARTITION", "")
        found.pop("SCLDM_CPUS_PER_TASK", None)  # those of a rank
    return found | {key: value for name, key in OF_SITE.items() if (value := getattr(job.options, name))}


def script(job: Job, site: Mapping[str, str], bad: Mapping[str, str]) -> str:
    """The batch script of a job: what sbatch reads, the settings, and slurm/job.sbatch from the job on.

    site: that of the job
    """
    template = (shipped("slurm") / "job.sbatch").read_text()
    key = "run_dir" if hasattr(job.config, "run_dir") else "out"
    words = [*job.words, *([] if made_by(job.config) == job.makes else [f"{key}={job.makes}"])]
    lines = ["#!/bin/bash", f"# written by: scldm submit {shlex.join([*job.verb.split(), *job.words])}"]
    lines += [f"#SBATCH {option}" for option in sbatch_options(job, site, bad)]
    if job.sbatch:
        lines.append("#SBATCH " + " ".join(quoted(word) for word in job.sbatch))
    lines += ["", template[template.index(BEGIN) : template.index(SETTINGS)] + "# --- settings ---", ""]
    lines.append(exports(for_nodes(site) | settings(job)))
    lines.append("set -- " + shlex.join([*job.verb.split(), *words]))
    return "\n".join([*lines, "", template[template.index(THE_JOB) :]])


def sbatch_options(job: Job, site: Mapping[str, str], bad: Mapping[str, str]) -> list[str]:
    (kind, gpus), n_ranks, cpus = gpus_of(job, site), ranks_per_node(site), site.get("SCLDM_CPUS_PER_TASK", "")
    on_all, array = job.on_all_ranks, job.array > 0
    # of a range of nodes, Slurm takes the smallest for one task per node
    few = on_all and n_ranks == 1 and job.options.least < job.options.most
    log = str(job.notes).replace("%", "%%") + ("/log-%a.txt" if array else "/log.txt")
    given = {
        "job-name": quoted(job.name),
        "output": quoted(log),
        "nodes": job.options.nodes if on_all else "1",
        **({"mincpus": cpus or "1"} if few else {"ntasks-per-node": str(n_ranks if on_all else 1)}),
        "gpus-per-node": f"{kind}{':' * bool(kind)}{gpus}" if gpus else "",
        "cpus-per-task": cpus,
        "array": f"0-{job.array - 1}{f'%{job.options.at_once}' if job.options.at_once else ''}" if array else "",
        "partition": site.get("SCLDM_PARTITION", ""),
        "account": site.get("SCLDM_ACCOUNT", ""),
        "qos": site.get("SCLDM_QOS", ""),
        "time": site.get("SCLDM_TIME", ""),
        "mem": site.get("SCLDM_MEMORY", ""),
        "exclude": ",".join(bad),
        "signal": f"B:USR1@{job.options.warn_s}",
    }
    return [f"--{key}={value}" for key, value in given.items() if value] + ["--requeue", "--open-mode=append"]


def gpus_of(job: Job, site: Mapping[str, str]) -> tuple[str, int]:
    """Type (empty where any will do) and number of the GPUs that a job asks for on a node."""
    kind, of_site = gpus_of_node(site)
    return kind, min(of_site, of_site if job.on_all_ranks else 1 if job.wants_gpus else 0)


def ranks_per_node(site: Mapping[str, str]) -> int:
    return gpus_of_node(site)[1] or int(site.get("SCLDM_TASKS_PER_NODE", 1))


def usable_counts(global_batch: int, micro_batch: int, per_node: int, most: int) -> list[int]:
    """Of 1 ... most nodes, the numbers that a global batch can be split over, in whole micro-batches of every rank."""
    return [n for n in range(1, most + 1) if global_batch % (n * per_node * micro_batch) == 0]


def quoted(word: str) -> str:
    """A word as sbatch reads it in a script's #SBATCH lines."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' if re.search(r"[\s'\"\\#]", word) else word


# --- what the job's steps are told ----------------------------------------------------------------------------------


def settings(job: Job) -> dict[str, str]:
    """The job's SCLDM_ variables beside the site's. With them, its steps need neither its config nor its packages."""
    options = job.options
    return {
        "SCLDM_NOTES": str(job.notes),
        "SCLDM_MADE": job.makes,
        "SCLDM_RANKS": "all" if job.on_all_ranks else "one",
        "SCLDM_SHARDS": job.shards,
        "SCLDM_STOP_SIGNAL": stop_signal(job.config),
        "SCLDM_PREFLIGHT": "on" if options.preflight else "off",
        "SCLDM_PREFLIGHT_S": str(options.preflight_s),
        "SCLDM_STAGE": "on" if options.stage and job.shards else "off",
        "SCLDM_MAX_FAILURES": str(options.max_failures),
        "SCLDM_WARN_S": str(options.warn_s),
        **({"SCLDM_PARENT": job.parent} if job.parent else {}),
        **({"SCLDM_MIN_NODES": str(options.least)} if options.least < options.most else {}),
    }


def settings_by_hand(words: Sequence[str]) -> dict[str, str]:
    """The same for a job that was sent with sbatch. Raises: InputError."""
    verb, rest = find_verb(words)
    if verb is None:
        raise InputError("slurm/job.sbatch: give a verb, as train vae")
    return settings(job_of(verb, rest, SubmitConfig()))


def stop_signal(config: Any) -> str:
    """What tells the ranks of a training to save and stop, as USR1. For other verbs it is TERM.

    Raises: InputError where the ranks catch none that srun passes on.
    """
    if not hasattr(config, "train"):
        return "TERM"
    passed_on = [name for name in ("SIGUSR1", "SIGUSR2", "SIGTERM") if name in config.train.stop_signals]
    if not passed_on:
        given = ", ".join(config.train.stop_signals) or "none"
        raise InputError(
            f"train.stop_signals={given}: a job is told to stop by SIGUSR1, SIGUSR2 or SIGTERM. Name one of them"
        )
    return passed_on[0].removeprefix("SIG")
