"""`scldm submit pipeline`: the whole path as jobs, each of which starts when the one before it has succeeded.

    shards (arrays, and a closing job) -> vae -> encode -> ldm -> export -> generate -> evaluate

Its words are those of the verbs. A preset goes to the links that its group is for. `vae.train.steps=9` goes to the link
vae as `train.steps=9`, and `vae=FILE.yaml` is a preset of that link. `vae.--nodes=8` is an option of submit for that
link's job, and `vae.--exclusive` one of sbatch. What one link makes for another lies below `out`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.convert.open import named as named_sources
from launch.cluster.job import Job, SubmitConfig, job_of
from launch.config import compose
from launch.keys import check_words, config_of_kinds
from scldm.errors import InputError
from scldm.train.tracking import TrackingConfig, begin_note

# link -> its verb, and its keys that the pipeline sets. {out} is the pipeline's folder
LINKS = {
    "shards": ("shards write", ["out={out}/shards"]),
    "vae": ("train vae", ["data.shards={out}/shards", "run_dir={out}/vae"]),
    "encode": ("encode", ["vae={out}/vae", "shards={out}/shards", "out={out}/latents"]),
    "ldm": ("train ldm", ["data.shards={out}/latents", "run_dir={out}/ldm"]),
    "export": ("export", ["vae={out}/vae", "ldm={out}/ldm", "out={out}/model"]),
    "generate": ("generate", ["model={out}/model", "out={out}/generated.h5ad"]),
    "evaluate": (
        "evaluate",
        [
            *("generated={out}/generated.h5ad", "shards={out}/shards"),
            *("model={out}/model", "vae={out}/vae", "ldm={out}/ldm", "out={out}/evaluation"),
        ],
    ),
}
# group of presets -> the links that it is for
PRESETS_OF = {"data": ["shards"], "vae": ["vae"], "ldm": ["ldm"], "hardware": ["vae", "ldm"]}


def jobs_of_pipeline(
    words: Sequence[str], options_of: Callable[[Sequence[str]], tuple[SubmitConfig, list[str]]]
) -> Callable[[], list[Job]]:
    """What makes the jobs of a pipeline, in their order. Both raise InputError: this for what the words say wrong, and
    that, which imports the verbs' packages, for whatever else a verb would refuse.

    options_of: a link's own options -> all that hold for it, and its words for sbatch
    """
    out, words_of, own = words_of_links(words)
    options = {}
    for link, (verb, _) in LINKS.items():
        with named(link):
            check_words(verb, words_of[link], there=False)
            options[link] = options_of(own[link])
    for link, (verb, _) in LINKS.items():
        check_atlas(verb, words_of[link])

    def jobs() -> list[Job]:
        made = []
        for link, (verb, _) in LINKS.items():
            of, sbatch = options[link]
            with named(link):
                job = job_of(verb, words_of[link], of, Path(out) / "slurm" / link, link)._replace(sbatch=sbatch)
            made += jobs_of_shards(job) if link == "shards" else [job]
        if not all(getattr(job.config, "tracking", TrackingConfig()).enabled for job in made):
            return made
        # an array is followed by its closing job
        return [job if job.array else job._replace(parent=out) for job in made]

    return jobs


def check_atlas(verb: str, words: Sequence[str]) -> None:
    """Raises: InputError where `shards write` is to read an atlas that is not there."""
    if verb == "shards write":
        named_sources(compose(config_of_kinds(verb), words).source)


@contextmanager
def named(link: str) -> Iterator[None]:
    """What is refused within, is refused of this link."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{link}: {error}") from None


def follow(chain: Sequence[Job]) -> None:
    """Note the run of a whole pipeline, for MLflow. Its jobs' runs are nested in it, and send it: nothing is sent here.
    It has the tracking keys of the link vae."""
    parent = next((job.parent for job in chain if job.parent), "")
    if parent:
        tracking = next(job.config.tracking for job in chain if job.name == "vae")
        params = {job.name: shlex.join(job.words) for job in chain}
        begin_note(Path(parent), tracking, "pipeline", params, closed_by="evaluate")


def words_of_links(words: Sequence[str]) -> tuple[str, dict[str, list[str]], dict[str, list[str]]]:
    """The pipeline's folder, the words of every link, and the options of its job."""
    out, words_of, options = "", {link: [] for link in LINKS}, {link: [] for link in LINKS}
    for word in words:
        key, equals, value = word.partition("=")
        link, _, rest = key.partition(".")
        if key == "out":
            out = os.path.abspath(value)
        elif not equals and word.split("/")[0] in PRESETS_OF and not word.endswith((".yaml", ".yml")):
            for name in PRESETS_OF[word.split("/")[0]]:
                words_of[name].append(word)
        elif link in LINKS and rest.startswith("--"):
            options[link].append(f"{rest}{equals}{value}")
        elif equals and link in LINKS:
            words_of[link].append(f"{rest}={value}" if rest else value)
        else:
            raise InputError(
                f"{word}: a pipeline takes presets, out=FOLDER, LINK.key=value, LINK=PRESET and LINK.--option=value. "
                f"its links are {', '.join(LINKS)}"
            )
    if not out:
        raise InputError("a pipeline needs out=FOLDER, which all nodes see")
    for link, (_, own) in LINKS.items():
        set_here = [word.format(out=out) for word in own]
        keys = {word.partition("=")[0] for word in set_here}
        if taken := [word for word in words_of[link] if word.partition("=")[0] in keys]:
            raise InputError(f"{link}.{taken[0]}: the pipeline sets this itself, from out")
        words_of[link] += set_here
    return out, words_of, options


def jobs_of_shards(job: Job) -> list[Job]:
    """Arrays that share the work, one for each of its stages, then the closing job. One task is one job alone."""
    n_tasks, filters = job.options.tasks, job.config.filter
    if n_tasks == 1:
        return [job]
    # transpose (of files that need it), scatter, gather. Genes may be counted, and again for the most variable ones
    n_stages = 3 + bool(filters.min_cells or filters.n_top_genes) + bool(filters.n_top_genes)
    arrays = [
        job._replace(name=f"shards-{k + 1}", notes=job.notes / f"stage-{k + 1}", array=n_tasks) for k in range(n_stages)
    ]
    closing = [*job.words, "finish=true"]
    finish = job_of(job.verb, closing, job.options, job.notes / "finish", "shards-finish")
    return [*arrays, finish._replace(sbatch=job.sbatch)]
