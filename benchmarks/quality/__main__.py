"""`python -m benchmarks.quality`: the benchmark of quality.

Reading order: main, run, judged, cells_of; the command line.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import scipy.sparse as sp
import torch
from threadpoolctl import threadpool_limits

from benchmarks.quality.cells import SPLIT_COLUMN, SPLITS, LabelledCells, Task, read_task
from benchmarks.quality.config import QualityConfig
from benchmarks.quality.figure import draw
from benchmarks.quality.judge import MEANING, N_COMPONENTS, PROTOCOL, TITLE, JudgeConfig, judge, response_of
from benchmarks.quality.known import scores_of
from benchmarks.quality.methods import METHODS, MODELS, chosen
from benchmarks.quality.table import Results, kept, print_tables, to_json
from benchmarks.quality.work import Place, run_row, say, settings_note, trained_once
from launch.config import compose, help_text
from scldm.errors import REFUSED, InputError, read_json
from scldm.files import made_aside, write_json

PURPOSE = """Train this project and other methods on the same cells with the same CPU time, generate cells of every
combination of the conditions, and score them against test cells. Run again with the same folder, it makes what is
missing."""
EXAMPLE = """
python -m benchmarks.quality h5ad=kang.h5ad conditions=cell_type,treatment out=runs/quality
python -m benchmarks.quality h5ad=kang.h5ad conditions=cell_type,treatment out=runs/unseen \\
    "held_out=cell_type=CD14+ Monocytes,treatment=stim" control=treatment=ctrl
"""
# what the rows of a folder depend on; methods, seeds and how they are judged may differ from one run to the next
FIXED = ("h5ad", "conditions", "layer", "split", "split_seed", "held_out", "control", "n_top_genes", "seconds")
FIXED_OF_OURS = ("vae", "ldm", "generate")


def main(config: QualityConfig) -> Results:
    """Make what is missing, score it, print the table, write figure and JSON."""
    place, task = Place(config), read_task(config)
    names = chosen(config, task)
    settings = {key: getattr(config, key) for key in (*FIXED, *FIXED_OF_OURS)}
    if changed := settings_note(place, settings):
        raise InputError(f"{place.out} holds rows of another run: {changed[0]}; choose another out")
    if not place.cells.is_file():
        write_task(task, place.cells)
    torch.set_num_threads(1)
    rows: dict[str, dict[int, Any]] = {}
    scores: dict[str, dict[int, Any]] = {}
    with threadpool_limits(1):
        for seed in config.seeds:
            for name in names:
                rows.setdefault(name, {})[seed] = run(task, place, name, seed)
                scores.setdefault(name, {})[seed] = judged(task, place, name, seed)
    results = Results(scores, rows)
    cells = {split: len(getattr(task, split)) for split in SPLITS}
    about = {**cells, "genes": len(task.genes), "combinations": len(task.numbers), "unseen": list(task.unseen)}
    protocol = {"protocol": f"{TITLE}: {MEANING}", "n_components": N_COMPONENTS}
    protocol |= {key: getattr(config, key) for key in ("min_cells", "max_cells")}
    shown = {**about, **settings, **protocol, "seeds": config.seeds, "threads": 1, "h5ad": Path(config.h5ad).name}
    if config.keep:
        same = (*(key for key in FIXED if key != "seconds"), *protocol, "seeds", *about)
        results, shown["kept"] = kept(Path(config.keep), results, shown, same)
    written = to_json(results, shown, command_line(config))
    if config.json:
        print(json.dumps(written, indent=1))
    else:
        print_tables(results, shown.get("kept", {}))
    title = f"{Path(config.h5ad).stem}: {len(task.train):,} training cells x {len(task.genes):,} genes, " + (
        f"{config.seconds:g} CPU-seconds a method, {len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}"
    )
    for path in filter(None, (str(place.out / "quality-scores.json"), config.save)):
        write_json(Path(path), written)
        draw(results, title, Path(path).with_suffix(".png"))
        say(f"written: {path}, {Path(path).with_suffix('.png')}")
    return results


def write_task(task: Task, path: Path) -> None:
    """The cells with their genes and splits as a file, which this project's verbs read."""
    parts = []
    for name in SPLITS:
        part = getattr(task, name).to_anndata()
        part.obs[SPLIT_COLUMN] = name
        parts.append(part)
    both = ad.concat(parts, index_unique="-", keys=SPLITS)
    with made_aside(path) as part:
        both.write_h5ad(part)


def run(task: Task, place: Place, name: str, seed: int) -> dict[str, Any]:
    """The note of a row; its model is trained, and its cells made, where they are not there."""
    method, folder = METHODS[name], place.row(name, seed)
    if (folder / "row.json").is_file():
        return read_json(folder / "row.json")
    model, training = place.model(method.model, seed), {}
    if method.model:
        training = trained_once(model, lambda of: MODELS[method.model](task, seed, of, place))
    return run_row(folder, task, name, training, lambda: method.draw(task, seed, model, place), seed)


def judged(task: Task, place: Place, name: str, seed: int) -> dict[str, Any]:
    """Scores of a row. Each kind is kept in the row's folder, with the settings that it was made with."""
    config, folder, method = place.config, place.row(name, seed), METHODS[name]
    generated = cells_of(task, folder)
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "scores": lambda: judge(
            task.train, task.validation, task.test, generated, JudgeConfig(config.min_cells, config.max_cells)
        ),
        "response": lambda: {
            "response": response_of(task.train, task.test, generated, task.references, config.min_cells)
        },
    }
    if know := method.known:
        kinds["known"] = lambda: {
            "test_cells": scores_of(task, know(task, seed, place.model(method.model, seed), place))
        }
    settings = {"protocol": PROTOCOL, "min_cells": config.min_cells, "max_cells": config.max_cells}
    found: dict[str, Any] = {}
    for kind, make in kinds.items():
        path = folder / f"{kind}.json"
        before = read_json(path) if path.is_file() and not config.judge else {}
        if before.get("settings") != settings:
            say(f"judges {folder.name}: {kind}")
            before = {"settings": settings, "scores": make()}
            write_json(path, before)
        found |= before["scores"]
    return found


def cells_of(task: Task, folder: Path) -> LabelledCells:
    """The cells that a row made."""
    made = ad.read_h5ad(folder / "generated.h5ad")
    labels = pd.DataFrame({name: made.obs[name].astype(str).to_numpy(object) for name in task.conditions})
    generated = LabelledCells(sp.csr_matrix(made.X), labels, tuple(made.var_names))
    assert generated.genes == task.genes
    return generated


def command_line(config: QualityConfig) -> str:
    """The command, with the file's name alone: where it lies on one machine says nothing to another."""
    words = [f"h5ad={Path(config.h5ad).name}" if word.startswith("h5ad=") else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", "benchmarks.quality", *words])


# --- the command line ----------------------------------------------------------------------------------------------


def run_command(words: Sequence[str]) -> int:
    """Returns the exit code: 0, or 2 for an InputError."""
    if "--help" in words or "-h" in words:
        usage = "python -m benchmarks.quality [key=value ...]"
        print(help_text("quality", PURPOSE, QualityConfig, EXAMPLE, usage))
        return 0
    try:
        main(compose(QualityConfig, words))
    except InputError as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:]))
