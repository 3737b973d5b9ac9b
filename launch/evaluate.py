"""`scldm evaluate`: generated cells against real ones; evaluation.json, figures, report.html, MLflow, a table."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from launch.cli import run_verb
from launch.evaluated_cells import cells_of_h5ad, cells_of_shards, generated_cells
from scldm.environment import describe
from scldm.errors import InputError
from scldm.evaluate.compare import EvaluateConfig, compare
from scldm.evaluate.curves import curves_of
from scldm.evaluate.figures import rivals_of, score_sections
from scldm.evaluate.metrics import METRICS
from scldm.evaluate.report import drawn_text, normalised_text, row_texts, verdicts, write_report
from scldm.evaluate.sample import Sample
from scldm.files import written_aside
from scldm.train.tracking import Tracker, TrackingConfig, read_metrics

PURPOSE = """
Compare generated cells with real ones: distances to the test cells beside those of the training cells (the floor) and
of three rivals drawn from them, marker genes, library sizes, a map. Writes report.html, evaluation.json and
figures/*.png.
"""
EXAMPLE = """
scldm evaluate generated=generated.h5ad shards=runs/quickstart/shards condition=cell_type out=runs/quickstart
scldm evaluate generated=generated.h5ad real=cells.h5ad split=split condition=cell_type out=evaluation
scldm evaluate generated=generated.h5ad shards=shards out=evaluation
"""
PACKAGES = ("scikit-learn", "POT", "umap-learn", "matplotlib")


@dataclass(frozen=True)
class EvaluateVerbConfig:
    """What `scldm evaluate` takes.

    generated: the generated cells' counts, as `scldm generate` writes them: .h5ad, .zarr or .soma
    out: folder for report.html, evaluation.json and figures
    condition: obs column (condition) whose labels are the types; empty: no types, all cells are scored at once
    shards: shard set with the real cells, their splits and conditions, a folder or fsspec URL
    cache_folder: where the index and blocks of a remote set are kept; that of a training serves
    cache_gb: limit of the blocks kept there, in 1e9 bytes
    real: h5ad file with the real cells, instead of shards
    split: obs column of `real` that says train, validation or test
    layer: where the counts of `real` are: X, raw or a layer's name; empty looks in X, layers/counts and raw
    vae_run: folder of the autoencoder's training run, for its loss curves
    ldm_run: folder of the diffusion model's training run, for its loss curves
    """

    generated: str = "???"
    out: str = "???"
    condition: str = ""
    shards: str = ""
    cache_folder: str = ""
    cache_gb: float = 50.0
    real: str = ""
    split: str = "split"
    layer: str = ""
    vae_run: str = ""
    ldm_run: str = ""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


CONFIG = EvaluateVerbConfig


def main(config: EvaluateVerbConfig) -> dict:
    """Returns the evaluation, as in evaluation.json."""
    curves = {
        stage: loss_curves(run, stage) for stage, run in (("vae", config.vae_run), ("ldm", config.ldm_run)) if run
    }
    if bool(config.real) == bool(config.shards):
        raise InputError(
            "give the real cells once: as shards=FOLDER, or as real=FILE.h5ad whose obs has a split column"
        )
    generated = generated_cells(config.generated, config.condition)
    sample = Sample(config.evaluate.max_real_cells, generated.numbers(), config.evaluate.seed)
    if config.shards:
        real = cells_of_shards(config.shards, config.condition, sample, config.cache_folder, config.cache_gb)
    else:
        real = cells_of_h5ad(config.real, config.condition, config.split, config.layer, sample)
    evaluation = compare(*real, generated, config.evaluate)
    evaluation["curves"] = curves
    evaluation["made_with"] = made_with(config)

    out = Path(config.out)
    written = write_report(evaluation, out)
    with written_aside(out / "evaluation.json") as file:
        file.write(json.dumps(evaluation, allow_nan=False).encode())
    # a folder of its own: `out` may be that of another tracked run
    tags = {"git": evaluation["made_with"]["commit"]}
    with Tracker(out / "evaluation", config.tracking, stage="evaluate", params=asdict(config), tags=tags) as tracker:
        tracker.log(0, flat_scores(evaluation), split="test")
        for path in [*written, out / "evaluation.json"]:
            tracker.log_artifact(path, "figures" if path.suffix == ".png" else "")
    show(evaluation, written[0])
    return evaluation


# --- what stands beside the scores ---------------------------------------------------------------------------------


def loss_curves(run: str, stage: str) -> dict:
    """Raises: InputError where the run has no metrics."""
    curves = curves_of(read_metrics(run))
    if not curves:
        raise InputError(f"{stage}_run={run}: no metrics.jsonl with metrics in it; give the folder of a training run")
    return curves


def made_with(config: EvaluateVerbConfig) -> dict:
    """Inputs, command, commit and versions."""
    here = describe()
    versions = {**here["versions"], **{p: metadata.version(p) for p in PACKAGES}}
    inputs = {
        k: getattr(config, k)
        for k in ("generated", "real", "shards", "condition", "split", "layer", "vae_run", "ldm_run")
    }
    inputs["real"] = config.real or config.shards
    return {
        "created": here["time"].replace("T", " ").removesuffix("+00:00") + " UTC",
        "command": here["command"],
        "commit": here["git"],
        "python": here["python"],
        **{k: v for k, v in inputs.items() if v and k != "shards"},
        "versions": dict(sorted(versions.items())),
    }


def flat_scores(evaluation: dict) -> dict[str, float]:
    """The numbers that MLflow gets: scores, floors and normalised scores, pooled and per type, and the share of markers
    up; what there is of them."""
    out = {}
    for section in score_sections(evaluation):
        for name, row in evaluation[section].items():
            out[f"{section}.{name}"] = row["score"]
            out[f"{section}.{name}.floor"] = row["floor"]["mean"]
            out |= {f"{section}.{name}.of_{k}": v for k, v in row["normalised"].items() if v is not None}
    up = [m["log2_fold_change"]["generated"] > 0 for m in evaluation.get("markers", [])]
    return {**out, "markers_up": float(np.mean(up))} if up else out


def show(evaluation: dict, report: Path) -> None:
    """The tables in the terminal."""
    console = Console(
        width=max(Console().width, 112), highlight=False
    )  # a narrow terminal wraps rather than hides digits
    names = {"per_type": "per type (mean over types, weighted by cells)", "pooled": "pooled (all cells at once)"}
    rivals = rivals_of(evaluation)
    for section in score_sections(evaluation):
        table = Table(title=f"scores {names[section]}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column("metric", no_wrap=True)
        marks = [f"({k})" for k in rivals]
        for column in ("generated", "floor", *marks, *(f"0…1 {mark}" for mark in marks)):
            table.add_column(column, justify="right", no_wrap=True)
        for name, row in evaluation[section].items():
            normalised = [normalised_text(row["normalised"][k], row["beats"][k]) for k in rivals]
            table.add_row(METRICS[name].title, *(mean for mean, _ in row_texts(row)), *normalised)
        console.print(table)
    if evaluation["pooled_only"]:
        console.print(evaluation["pooled_only"], soft_wrap=True)
    if evaluation["cells"].get("drawn_of"):  # which an evaluation of an older version lacks
        console.print(drawn_text(evaluation), soft_wrap=True)
    listed = "; ".join(f"({k}) {title}" for k, (title, *_) in rivals.items())
    console.print(f"floor: the training cells themselves; rivals drawn from them: {listed}", soft_wrap=True)
    note = "0…1: (score - floor) / (rival - floor); ✓ closer to the test cells than the rival; "
    note += "\N{EN DASH} rival no worse than the floor"
    console.print(note, soft_wrap=True)
    for figure, text in verdicts(evaluation):
        console.print(f"{figure:>9}  {text}", soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_verb("evaluate", sys.argv[1:]))
