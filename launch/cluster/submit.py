"""`scldm submit`: a verb as a Slurm job. Everything that can be wrong is said before anything is submitted.

Reading order: read, options_of, main, checks. What a job is, and its script, are in job.py, and chains in pipeline.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.cli import find_verb
from launch.cluster import commands as slurm
from launch.cluster.containers import container_of
from launch.cluster.job import (
    OF_SITE,
    Job,
    SubmitConfig,
    gpus_of,
    job_of,
    ranks_per_node,
    script,
    site_of_job,
    usable_counts,
)
from launch.cluster.notes import bad_nodes, submitted
from launch.cluster.pipeline import check_atlas, follow, jobs_of_pipeline, jobs_of_shards
from launch.cluster.site import read_site, site_path
from launch.config import compose, public_words, with_options_read
from launch.keys import ANY, check_words, keys_of
from scldm.errors import InputError
from scldm.files import write_json

PURPOSE = """Run a verb as a Slurm job on one or many nodes, one rank per GPU: writes the batch script, submits it,
prints the job's id. `scldm submit pipeline` does so for the whole path, as jobs that follow one another. An option of
one of them is LINK.--option=value. The options below are given as --option value. Presets and keys are the verb's.
The site's partition, account, GPUs per node and so on stand in slurm/site.sh, or in the file that $SCLDM_SITE names."""
EXAMPLE = """
scldm submit train vae vae/70m data.shards=shards run_dir=runs/vae --nodes 4
scldm submit train vae vae/70m data.shards=shards run_dir=runs/vae --nodes 1-4 --dry-run -- --exclusive
scldm submit shards write data/census source.census_version=2025-01-30 out=shards --tasks 16
"""
NOT_AS_A_JOB = ("submit", "status", "logs", "quickstart", "track")
# LETTERS: sbatch's letter -> its name. SET_HERE: its names that a job sets itself -> what to give
LETTERS = {"p": "partition", "A": "account", "q": "qos", "t": "time", "c": "cpus-per-task", "N": "nodes"}
LETTERS |= {"n": "ntasks", "G": "gpus", "a": "array", "o": "output", "e": "error"}
RANKS = "--gpus-per-node, or SCLDM_TASKS_PER_NODE in the site file: so many ranks run on a node"
LOG = "nothing: the log lies in the job's notes, and `scldm logs` prints it"
SET_HERE = {"ntasks": RANKS, "ntasks-per-node": RANKS, "gpus": RANKS, "gpus-per-task": RANKS, "gres": RANKS}
SET_HERE |= {"array": "--tasks and --at-once", "output": LOG, "error": LOG, "signal": "--warn-s"}
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs", "squashfs")
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


CONFIG = SubmitConfig
FIRST = (
    *("nodes", "partition", "account", "time", "mem"),
    *("gpus_per_node", "cpus_per_task", "tasks", "stage", "dry_run"),
)
USAGE = "scldm submit VERB [PRESET ...] [key=value ...] [--option value ...] [-- SBATCH ARGUMENTS]"


class Submission(NamedTuple):
    """A command line of submit: its own options, and what makes the jobs that it asks for, in their order."""

    options: SubmitConfig
    jobs: Callable[[], list[Job]]


def read(words: Sequence[str]) -> Submission:
    """Take a command line apart. Raises: InputError, also for what the words say wrong to the verb. What its config
    refuses, and its packages, wait until Slurm has answered."""
    for word in words:  # they stand in the lines of a shell script
        if not word.isprintable():
            raise InputError(f"{word!r}: a job's words can't hold line breaks or other control characters")
    words = public_words(words)
    end = words.index("--") if "--" in words else len(words)
    told = list(with_options_read(SubmitConfig, words[:end], only_known=True))
    given, rest = [word for word, is_option in told if is_option], [word for word, is_option in told if not is_option]
    options, sbatch = options_of(given, words[end + 1 :])
    if rest[:1] == ["pipeline"]:
        return Submission(options, jobs_of_pipeline(rest[1:], lambda own: options_of(given, [*words[end + 1 :], *own])))
    verb, rest = find_verb(rest)
    if verb is None or verb.split()[0] in NOT_AS_A_JOB:
        raise InputError("name a verb that can run as a job: train vae, encode, pipeline, ...")
    for word in rest:
        if word.startswith("-") and not {ANY, word.lstrip("-").partition("=")[0].replace("-", "_")} & {*keys_of(verb)}:
            raise InputError(f"{word}: neither submit nor {verb} has it. Words for sbatch stand at the end, after --")
    check_words(verb, rest, there=False)
    check_atlas(verb, rest)

    def jobs() -> list[Job]:
        job = job_of(verb, rest, options)._replace(sbatch=sbatch)
        return jobs_of_shards(job) if verb == "shards write" else [job]

    return Submission(options, jobs)


def options_of(given: Sequence[str], sbatch: Sequence[str]) -> tuple[SubmitConfig, list[str]]:
    """submit's options, also of those words for sbatch that mean one of them. Then the words that mean none.

    given: options as key=value
    Raises: InputError for a word of sbatch that a job sets itself, with what to give in its place.
    """
    spelled = []
    for word, following in zip(sbatch, [*sbatch[1:], ""]):  # which is a value where the word has none
        letter = re.fullmatch(r"-(\w)=?(.*)", word)
        if letter and letter[1] in LETTERS:
            word = f"--{LETTERS[letter[1]]}{'=' if letter[2] else ''}{letter[2]}"
        name = word.removeprefix("--").partition("=")[0] if word.startswith("--") else ""
        if name in SET_HERE and (name != "gres" or "gpu" in (word if "=" in word else following)):
            raise InputError(f"{word}: submit sets this itself. Give {SET_HERE[name]}")
        spelled.append(word)
    told = list(with_options_read(SubmitConfig, spelled, only_known=True))
    options = compose(SubmitConfig, [*given, *(word for word, is_option in told if is_option)])
    return options, [word for word, is_option in told if not is_option]


def main(submission: Submission) -> list[str]:
    """Submit. Returns the ids of the jobs (none for a dry run), the last one's last."""
    options = submission.options
    of_all = read_site(site_path())
    partitions = ask_slurm(options)
    chain = submission.jobs()
    check_opened(chain)
    texts = []
    for job in chain:
        site = site_of_job(job, of_all)
        check_container(job, site)
        check_stage(job, site)
        check_notes(job, site)
        check_gpus(job, site)
        if partitions:
            partition = check_partition(job, site, partitions)
            check_nodes(job, site, partition)
            if job.wants_gpus and "SCLDM_CPUS_PER_TASK" not in site:
                n_ranks = ranks_per_node(site) if job.on_all_ranks else 1
                site["SCLDM_CPUS_PER_TASK"] = str(partition.cpus_of_rank(*gpus_of(job, site), n_ranks))
        texts.append(script(job, site, bad_nodes(job.notes)))
        for node, why in bad_nodes(job.notes).items():
            print(
                f"left out: {node} ({why}). Remove its line from {job.notes / 'bad_nodes'} to use it", file=sys.stderr
            )
    if options.dry_run:
        print("\n".join(texts))
        return []
    if len(chain) > 1:
        folder = chain[-1].notes.parent
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "chain.json", [str(job.notes) for job in chain])
        follow(chain)
    ids: list[str] = []
    try:
        for job, text in zip(chain, texts):
            ids.append(submit(job, text, after=ids[-1:]))
    except (InputError, OSError) as error:
        raise InputError(f"{error}{take_back(ids, chain)}") from None
    return ids


def take_back(ids: Sequence[str], chain: Sequence[Job]) -> str:
    """Cancel the first jobs of a chain whose next one can't be submitted. Returns what to say of it."""
    if not ids:
        return ""
    told = f". {chain[len(ids)].name} was not submitted, the jobs before it ({', '.join(ids)})"
    try:
        slurm.call("scancel", *ids)
    except InputError as error:
        return f"{told} were, and can't be cancelled: {error}"
    return f"{told} are cancelled again"


def submit(job: Job, text: str, after: Sequence[str]) -> str:
    """Write the script and submit it, to run once the job `after` has succeeded. Prints and returns the id."""
    job.notes.mkdir(parents=True, exist_ok=True)
    path = job.notes / "job.sbatch"
    path.write_text(text)
    options = [f"--dependency=afterok:{after[0]}", "--kill-on-invalid-dep=yes"] if after else []
    number = slurm.sbatch(path, *options)
    write_json(job.notes / "job.json", {"id": number, "name": job.name, "words": [*job.verb.split(), *job.words]})
    for old in job.notes.glob("state*"):
        old.unlink()
    print(number, flush=True)
    place = f", after {after[0]}" if after else ""
    print(f"job {number}: {job.name}{place}. Script, log and state in {job.notes}", file=sys.stderr)
    return number


# --- checks ---------------------------------------------------------------------------------------------------------


def ask_slurm(options: SubmitConfig) -> dict[str, slurm.Partition]:
    """The partitions. None for a dry run where Slurm does not answer, which is said. Raises: InputError."""
    try:
        return slurm.partitions()
    except InputError as error:
        if not options.dry_run:
            raise
        print(f"not checked against Slurm: {error}", file=sys.stderr)
        return {}


def check_partition(job: Job, site: Mapping[str, str], known: Mapping[str, slurm.Partition]) -> slurm.Partition:
    """The partition that a job goes to. Raises: InputError where there is none such, or it has too few GPUs."""
    name = site.get("SCLDM_PARTITION") or next((p.name for p in known.values() if p.is_default), "")
    if name not in known:
        told = f"partition {name!r} is unknown" if name else "no partition is given, and Slurm has no default"
        raise InputError(f"{given_as('partition', job, site)}: {told}. There are: {slurm.listed(sorted(known))}")
    kind, wanted = gpus_of(job, site)
    if wanted > (most := known[name].gpus_per_node(kind)):
        told = f"{given_as('gpus_per_node', job, site)}: {job.name} wants {wanted} on a node"
        types = slurm.listed(sorted({kind for gpus, _ in known[name].nodes.values() for kind in gpus if kind}))
        such = f" of type {kind} (types there: {types})" if kind else ""
        raise InputError(f"{told}, and a node of partition {name} has {most} GPUs{such}")
    return known[name]


def check_gpus(job: Job, site: Mapping[str, str]) -> None:
    """Raises: InputError for a training that would refuse its node only once it has waited in the queue."""
    if getattr(getattr(job.config, "hardware", None), "require_gpu", False) and not gpus_of(job, site)[1]:
        raise InputError(
            f"{job.name}: hardware.require_gpu=true, and a node has no GPU by the site file: give --gpus-per-node, "
            "SCLDM_GPUS_PER_NODE there, or hardware.require_gpu=false"
        )


def given_as(option: str, job: Job, site: Mapping[str, str]) -> str:
    """Where a setting of a job stands: in its option, or in the site file."""
    of_site = OF_SITE[option]
    if option == "partition" and not job.wants_gpus and site.get("SCLDM_CPU_PARTITION"):
        of_site = "SCLDM_CPU_PARTITION"
    name, value = f"--{option.replace('_', '-')}", getattr(job.options, option)
    return f"{name} {value}" if value else f"{of_site}={site.get(of_site, '')}"


def check_stage(job: Job, site: Mapping[str, str]) -> None:
    """Raises: InputError where shards are to be staged and can't be, as those in an object store, whose readers keep a
    cache."""
    if not job.options.stage:
        return
    scratch = site.get("SCLDM_SCRATCH", "")
    if not scratch:
        raise InputError("--stage needs SCLDM_SCRATCH in the site file: a folder on each node's own disk")
    container = container_of(site)
    if container and not container.shows(scratch):
        raise InputError(
            f"--stage: what is staged must outlive a container. SCLDM_CONTAINER_MOUNTS needs {scratch}:{scratch}"
        )
    if "://" in job.shards:
        raise InputError(
            f"--stage: {job.shards} is no folder that the nodes see. Leave --stage out, and set data.cache_folder"
        )


def check_container(job: Job, site: Mapping[str, str]) -> None:
    """Raises: InputError for a container that the site file says wrong, or in which a job could not leave its notes."""
    container, folder = container_of(site), job.notes.parent
    if container and container.runtime == "podman" and not container.shows(folder):  # others may mount by themselves
        raise InputError(f"{folder}: Podman mounts no folder by itself. SCLDM_CONTAINER_MOUNTS needs one that holds it")


def check_nodes(job: Job, site: Mapping[str, str], partition: slurm.Partition) -> None:
    """Says on how many nodes a training will run, where it can't use all that are asked for.

    Raises: InputError where there are too few nodes, or no number of them in the range can be used.
    """
    options = job.options
    if not job.on_all_ranks:
        return
    kind, wanted = gpus_of(job, site)
    fit = {node for node, (gpus, _) in partition.nodes.items() if slurm.n_gpus(gpus, kind) >= wanted}
    left_out = sorted(fit & bad_nodes(job.notes).keys())
    n_nodes = len(fit) - len(left_out)
    if options.least > n_nodes:
        why = f", and {n_nodes} without those that a preflight found unfit: {', '.join(left_out)}" if left_out else ""
        such = f" with {wanted} GPUs{f' of type {kind}' if kind else ''}" if len(fit) < len(partition.nodes) else ""
        raise InputError(f"--nodes {options.nodes}: partition {partition.name} has {len(fit)} nodes{such}{why}")
    if not hasattr(job.config, "train"):
        return
    cells, micro = job.config.train.global_batch, job.config.hardware.micro_batch
    n_ranks = ranks_per_node(site)
    usable = usable_counts(cells, micro, n_ranks, options.most)
    told = f"train.global_batch={cells} with hardware.micro_batch={micro} on nodes of {n_ranks} ranks"
    if not usable or (options.least < options.most and usable[-1] < options.least):
        can = f"only {slurm.listed(list(map(str, usable)))}" if usable else "no number"
        raise InputError(f"--nodes {options.nodes}: {told} can use {can} of nodes. Change one of them")
    if not options.preflight and not {*range(options.least, options.most + 1)} <= {*usable}:
        raise InputError(f"--nodes {options.nodes}: {told} can't use every number of nodes, and preflight chooses one")
    if usable[-1] < options.most:
        print(
            f"--nodes {options.nodes}: {told} can use {usable[-1]} at most, and leaves the others idle", file=sys.stderr
        )


def check_opened(chain: Sequence[Job]) -> None:
    """Raises: InputError where an atlas is to be read that is no SOMA, or not said well enough."""
    first = next((job for job in chain if job.verb == "shards write"), None)
    if first is not None:
        from data_pipeline.convert.open import resolve  # which other jobs need nothing of

        resolve(first.config.source)


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
                f"{folder} is {why}, which is each node's own. Choose a folder on a shared file system, or name the "
                "shared ones in SCLDM_SHARED"
            )
    if (job.notes / "job.json").is_file() and not job.options.dry_run:
        number = submitted(job.notes)
        state, _ = slurm.job_state(number) or ("", "")
        if state and state not in slurm.ENDED:
            raise InputError(f"{job.notes}: job {number} of this run is {state}. Wait for it, or scancel {number}")


def file_system_of(folder: Path) -> str:
    """The type of the file system that holds a folder, which need not exist yet. Empty where it can't be known."""
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
