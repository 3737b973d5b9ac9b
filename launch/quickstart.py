"""`bash launch/quickstart.sh`: every stage of the project on one small set of real cells, each by its own verb.

Each stage is a command that a user could type, and is printed as such. A finished stage is noted in the folder's
quickstart.json and not repeated. An unfinished one resumes by itself.
Reading order: QuickstartConfig, main, the stages, the built-in cells.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from scldm.cells_opened import column_names, frame_of, layer_in, open_cells, reading
from scldm.checked import Checked, checked
from scldm.errors import REQUEUE, STOPPED, InputError, Stopped, read_json
from scldm.files import made_aside, write_json, written_aside
from scldm.given_json import typed
from scldm.train.mlflow_run import database_uri
from scldm.train.tracking import PARENT, Tracker, TrackingConfig

PURPOSE = """The whole path on one small set of real cells, on a CPU: shards, both trainings, generation,
evaluation, report.
Without h5ad, the cells are 700 PBMCs x 765 genes that scanpy carries. Run again, it goes on where it stopped."""
EXAMPLE = """
bash launch/quickstart.sh
bash launch/quickstart.sh --h5ad cells.h5ad --condition cell_type --condition treatment
"""
NOTE = "quickstart.json"
MOST_THREADS = 4  # beyond it steps this small are no faster. Half the cores, as threads that wait for one are slow
# all that it leaves in its folder. The note is removed last, so that an interrupted removal is known for what it is
MADE = (
    *("input.h5ad", "soma", "shards", "vae", "reconstruction", "latents", "ldm", "model", "wanted.csv"),
    *("generated.h5ad", "generated.h5ad.parts", "evaluation", "evaluation.json", "report.html", "figures"),
    *("metrics.jsonl", "system.jsonl", "tracked.json", "tracking", "tracking.lock", "mlflow_run.json"),
    *("mlflow_run.json.lock", "mlflow.db", "mlflow_artifacts", NOTE),
)


@dataclass(frozen=True)
class QuickstartConfig(Checked):
    """What to run it on.

    h5ad: h5ad or zarr file with raw counts. Empty takes the built-in cells
    condition: obs columns whose labels are conditions, such as cell_type. Several with a comma, or one after another
    layer: where the counts are, as X, layers/counts or raw/X. Empty finds out
    top_genes: of a file with more genes, only so many most variable ones are kept. 0 keeps all
    out: folder of everything that it makes
    ranks: processes that train and encode. Several run under torchrun and DeepSpeed, as on a cluster
    fresh: start over: remove what an earlier quickstart left in that folder
    """

    h5ad: str = ""
    condition: tuple[str, ...] = ()
    layer: str = ""
    top_genes: int = checked(2_000, at_least=0)
    out: str = "runs/quickstart"
    ranks: int = checked(1, at_least=1)
    fresh: bool = False


CONFIG = QuickstartConfig


def main(config: QuickstartConfig) -> None:
    """Run what is left of the stages, then print the table and where everything lies."""
    out = Path(config.out)
    note = open_folder(config, out)
    began = time.monotonic()
    cells, conditions = note["cells"], note["condition"]
    if not cells:
        cells, conditions = str(out / "input.h5ad"), ["cell_type"]
    tracking = TrackingConfig(uri=database_uri((out / "mlflow.db").resolve()), experiment="quickstart")
    settings = {key: value for key, value in note.items() if key != "stages"}
    with Tracker(out, tracking, stage="quickstart", params=settings):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = [f"hardware.threads={max(1, min(MOST_THREADS, cores // 2 // config.ranks))}"]
        todo = Stages(out, note, parent=out.resolve())
        if not note["cells"]:
            todo.call("input", "the built-in cells", lambda: write_builtin_cells(Path(cells)))
        layer = [f"layer={note['layer']}"] if note["layer"] else []
        todo.verb("soma", "soma write", [f"h5ad={cells}", f"out={out}/soma", *layer])
        # small blocks, so that a few hundred cells still are many blocks to shuffle
        todo.verb("shards", "shards write", [
            f"source.paths={out}/soma", f"out={out}/shards", "block_cells=64", "shard_cells=1024",
            f"conditions={json.dumps(conditions)}", f"split.stratify={json.dumps(conditions)}",
            "split.validation=0.2", "split.test=0.2",
            f"filter.n_top_genes={note['top_genes']}",
        ])  # fmt: skip
        todo.verb("vae", "train vae", [
            "vae/tiny", "hardware/cpu", *threads, f"data.shards={out}/shards", f"run_dir={out}/vae",
            "gate=false",  # the next stage says more
        ], ranks=config.ranks)  # fmt: skip
        # what the autoencoder is worth, before a second stage is trained on it
        todo.verb("reconstruction", "evaluate", [
            f"vae={out}/vae", f"shards={out}/shards", f"conditions={json.dumps(conditions)}",
            f"out={out}/reconstruction",
        ])  # fmt: skip
        todo.verb("latents", "encode", [
            f"vae={out}/vae", f"shards={out}/shards", f"out={out}/latents",
        ], ranks=config.ranks)  # fmt: skip
        todo.verb("ldm", "train ldm", [
            "ldm/tiny", "hardware/cpu", *threads, f"data.shards={out}/latents", f"run_dir={out}/ldm",
        ], ranks=config.ranks)  # fmt: skip
        todo.verb("model", "export", [f"vae={out}/vae", f"ldm={out}/ldm", f"out={out}/model"])
        todo.call(
            "wanted", "as many cells of each combination as are test cells", lambda: write_wanted(out, conditions)
        )
        todo.verb("generated", "generate", [
            f"model={out}/model", f"conditions={out}/wanted.csv", f"out={out}/generated.h5ad",
        ])  # fmt: skip
        todo.verb("evaluation", "evaluate", [
            f"generated={out}/generated.h5ad", f"shards={out}/shards", f"conditions={json.dumps(conditions)}",
            f"model={out}/model", f"vae={out}/vae", f"ldm={out}/ldm", f"out={out}",
        ])  # fmt: skip
    say_where(out, todo, time.monotonic() - began)


# --- stages --------------------------------------------------------------------------------------------------------


class Stages:
    """Runs the stages that the note in the folder does not list as finished.

    parent: folder of the run that the stages' runs are nested in
    """

    def __init__(self, out: Path, note: dict, name: str = NOTE, parent: Path | None = None) -> None:
        self.path, self.note, self.n_run = out / name, note, 0
        self.env = {PARENT: str(parent)} if parent else {}

    def verb(self, stage: str, verb: str, arguments: Iterable[str], ranks: int = 1) -> None:
        """A verb as a command of its own, on one process or under torchrun."""
        # -P: a launch.py in the user's folder is not ours
        command = [sys.executable, "-P", "-m", "launch.cli", *verb.split(), *arguments]
        if ranks > 1:
            torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--no-python"]
            command = [*torchrun, f"--nproc-per-node={ranks}", *command]
        shown = shlex.join("python" if word == sys.executable else word for word in command)
        self.call(stage, shown, lambda: run(stage, command, self.env))

    def call(self, stage: str, shown: str, work) -> None:
        if stage in self.note["stages"]:
            return
        print(f"\n[{stage}] {shown}", file=sys.stderr, flush=True)
        began = time.monotonic()
        work()
        self.n_run += 1
        self.note["stages"][stage] = round(time.monotonic() - began, 1)
        write_json(self.path, self.note)


@contextmanager
def signals_passed_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """A stage that is told to stop saves first, and does not go on alone."""

    def told(*_: object) -> None:
        with suppress(ProcessLookupError):
            child.terminate()

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(stage: str, command: list[str], own: Mapping[str, str]) -> None:
    """Raises: InputError where the command fails, and Stopped where it saved what it had. It has said why itself."""
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    # one thread a process but where a verb asks for more. Torchrun would say so at length
    env = {"OMP_NUM_THREADS": "1", **os.environ, **own, "PYTHONPATH": path}
    with subprocess.Popen(command, env=env) as child, signals_passed_to(child):
        code = child.wait()
    if code in (REQUEUE, STOPPED):
        print(f"scldm: stopped in stage {stage}, which is saved. The same command goes on", file=sys.stderr, flush=True)
        raise Stopped(code, f"stage {stage}")
    if code:
        raise InputError(f"stage {stage} failed with exit code {code}. Its own message stands above")


def open_folder(config: QuickstartConfig, out: Path) -> dict:
    """The folder's note: settings and the seconds of every finished stage.

    Raises: InputError for an h5ad without a condition, or a folder of another run.
    """
    if bool(config.h5ad) != bool(config.condition):
        raise InputError("h5ad and condition go together: the file, and the obs columns that cells are generated for")
    path = out / NOTE
    if not path.is_file() and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and not a quickstart's folder. Choose another --out")
    if config.h5ad:
        check_cells(config)
    cells = str(Path(config.h5ad).resolve()) if config.h5ad else ""
    settings = {"cells": cells, "condition": list(config.condition), "layer": config.layer}
    settings |= {"top_genes": config.top_genes}
    if config.fresh and path.is_file():
        for name in MADE:
            made = out / name
            shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
    if path.is_file():
        note = asdict(typed(_Note, read_json(path), str(path)))
        for key, value in settings.items():
            if note[key] != value:
                told = f"{key} was {note[key]!r}, now {value!r}"
                raise InputError(f"{out} holds another run: {told}. --fresh starts over")
        return note
    out.mkdir(parents=True, exist_ok=True)
    note = {**settings, "stages": {}}
    write_json(path, note)
    return note


@dataclass(frozen=True)
class _Note:
    """What was asked for, and the seconds of each stage that is done."""

    cells: str
    condition: list[str]
    layer: str
    top_genes: int
    stages: dict[str, float]


def check_cells(config: QuickstartConfig) -> None:
    """Raises: InputError for a file without usable counts or without the condition, before anything is made."""
    with open_cells(config.h5ad) as file, reading(config.h5ad):
        columns = column_names(frame_of(file, "obs", config.h5ad))
        for name in config.condition:
            if name not in columns:
                told = f"obs of {config.h5ad} has no such column. It has {', '.join(columns)}"
                raise InputError(f"condition={name}: {told}")
        if config.layer:
            layer_in(file, config.layer, config.h5ad, "layer")
        # below what takes no time: these take seconds to import
        from data_pipeline.convert.config import ShardsWriteConfig
        from data_pipeline.convert.source_h5ad import find_counts

        find_counts(file, config.layer)
    ShardsWriteConfig(out="", conditions=config.condition)  # refuses a name that can't be a file's


def write_wanted(out: Path, conditions: Sequence[str]) -> None:
    """A table of conditions: each combination with the number of test cells that have it."""
    import numpy as np
    import pandas as pd

    from data_pipeline.format.schema import read_manifest

    manifest = read_manifest(str(out / "shards"))
    test = manifest.splits[manifest.split_number("test")]
    labels = {}
    for name in conditions:
        ids = np.load(out / "shards" / "index" / f"cells.condition.{name}.npy")[test.first_cell :][: test.n_cells]
        labels[name] = manifest.conditions.decode(name, ids.tolist())
    with written_aside(out / "wanted.csv") as file:
        pd.DataFrame(labels).value_counts().rename("n_cells").to_csv(file)


def say_where(out: Path, todo: Stages, seconds: float) -> None:
    """The last words."""
    if todo.n_run == 0:
        from launch.evaluation.of_generated import show

        show(read_json(out / "evaluation.json"), out / "report.html")
        print(f"\nall is done already ({sum(todo.note['stages'].values()):.0f} s in all). --fresh starts over")
    else:
        print(f"\n{todo.n_run} stages in {seconds:.0f} s")
    what = {
        "report.html": "the report: open it in a browser",
        "generated.h5ad": "generated cells",
        "evaluation.json": "every number of the report",
        "model": "the model: scldm.load(...) in Python",
        "shards": "the cells as training shards",
        "latents": "the cells, encoded",
        "vae/checkpoints": "checkpoints of the autoencoder",
        "ldm/checkpoints": "checkpoints of the diffusion transformer",
    }
    for name, meaning in what.items():
        print(f"  {out / name!s:<36} {meaning}")
    print(f"  mlflow ui --backend-store-uri {shlex.quote(database_uri(out / 'mlflow.db'))}")


# --- the built-in cells --------------------------------------------------------------------------------------------


def write_builtin_cells(path: Path) -> None:
    from scldm.cells_file import write_cells
    from scldm.examples import pbmc

    with made_aside(path) as part:
        write_cells(pbmc(), part, compression=None)
