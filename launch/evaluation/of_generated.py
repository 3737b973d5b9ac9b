"""Generated cells against real ones, for `scldm evaluate generated=FILE`: evaluation.json, figures, report, MLflow.

Reading order: evaluate_generated, the model's parts, what stands beside the scores, the tables in the terminal.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from launch.evaluation.cells import cells_of_h5ad, cells_of_shards, conditions_of_shards, generated_cells, obs_columns
from launch.evaluation.terminal import console, started
from launch.followed import dataset_of
from scldm.environment import made_with
from scldm.errors import InputError
from scldm.evaluate.baselines import rows_per_type
from scldm.evaluate.beside import Part
from scldm.evaluate.cells import Cells
from scldm.evaluate.compare import compare
from scldm.evaluate.curves import curves_of
from scldm.evaluate.figures.scores import baselines_of, score_sections
from scldm.evaluate.intervals import WIDTH
from scldm.evaluate.memorisation import MEMORISATION
from scldm.evaluate.metrics import METRICS
from scldm.evaluate.report import drawn_text, matched_text, tiles, write_report
from scldm.evaluate.report_tables import row_texts
from scldm.evaluate.sample import Sample
from scldm.files import write_bytes
from scldm.train.tracking import Tracker, check_tracking, read_metrics

if TYPE_CHECKING:
    from launch.evaluation.config import EvaluateVerbConfig
    from scldm.pretrained import Pretrained

PACKAGES = ("scikit-learn", "POT", "umap-learn", "matplotlib")
MARKS = {True: "✓", False: "✗", None: "\N{EN DASH}"}
INPUTS = ("generated", "model", "vae", "ldm", "conditions", "protocol", "split", "layer")


def evaluate_generated(config: EvaluateVerbConfig) -> dict:
    """Returns the evaluation, as in evaluation.json."""
    check_tracking(config.tracking, Path(config.out) / "evaluation")
    runs = {stage: run for stage, run in (("vae", config.vae), ("ldm", config.ldm)) if run}
    curves = {stage: loss_curves(run, stage) for stage, run in runs.items()}
    model = load_model(config) if config.model else None
    conditions = judged_conditions(config, model)
    missing = model.missing if model else {}
    generated = generated_cells(config.generated, conditions, missing)
    sample = Sample(config.evaluate.max_real_cells, generated.numbers(), config.evaluate.seed)
    if config.shards:
        every = cells_of_shards(config.shards, conditions, sample, config.cache_folder, config.cache_gb)
    else:
        every = cells_of_h5ad(config.real, conditions, config.split, config.layer, sample, missing)
    train, validation, test = every
    began = time.time()
    parts = parts_of(model, train, test, config) if model else {}
    evaluation = compare(train, validation, test, generated, config.evaluate, config.protocol, config.control, parts)
    evaluation["curves"] = curves
    inputs = {k: getattr(config, k) for k in INPUTS}
    inputs |= {"conditions": ", ".join(config.conditions), "real": config.real or config.shards}
    evaluation["made_with"] = made_with({k: v for k, v in inputs.items() if v}, PACKAGES)

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    # before anything is drawn of it
    write_bytes(out / "evaluation.json", json.dumps(evaluation, allow_nan=False).encode())
    tracked = config.shards and config.tracking.enabled
    datasets = [dataset_of(config.shards, "evaluation")] if tracked else []
    of = {"stage": "evaluate", "params": asdict(config), "datasets": datasets, "started": began}
    with Tracker(out / "evaluation", config.tracking, **of) as tracker:  # a folder of its own: `out` may be another's
        tracker.log(0, flat_scores(evaluation), split="test", cells_seen=None)
        headline = next(evaluation[section] for section in score_sections(evaluation))
        tracker.log_on_parent({name: row["score"] for name, row in headline.items()}, "test")
        written = write_report(evaluation, out)
        for path in [*written, out / "evaluation.json"]:
            tracker.log_artifact(path, "figures" if path.suffix == ".png" else "")
    show(evaluation, written[0])
    return evaluation


def judged_conditions(config: EvaluateVerbConfig, model: Pretrained | None) -> tuple[str, ...]:
    """As asked for, else all that the model has. Without a model, those of the shard set that generated cells say.
    `none` alone stands for none, unless the real cells have a condition of that name."""
    if config.conditions == ("none",):
        shards = config.shards
        there = conditions_of_shards(shards, config.cache_folder) if shards else obs_columns(config.real)
        return tuple(c for c in config.conditions if c in there)
    if config.conditions:
        return config.conditions
    if model is not None:
        return tuple(model.dit.n_labels) if model.dit is not None else tuple(model.conditions.names)
    if not config.shards:
        return ()
    there = obs_columns(config.generated)
    return tuple(c for c in conditions_of_shards(config.shards, config.cache_folder) if c in there)


# --- the model's parts ---------------------------------------------------------------------------------------------


def load_model(config: EvaluateVerbConfig) -> Pretrained:
    import scldm
    from scldm.networks import device_of

    return scldm.load(config.model, device_of(config.device), batch=config.batch, precision=config.precision)


def parts_of(model: Pretrained, train: Cells, test: Cells, config: EvaluateVerbConfig) -> dict[str, Part]:
    """Cells that show which part of the model costs what: `evaluate.max_cells` of each, or more where every combination
    of test cells is to have 50, or as many as one is scored with."""
    from launch.evaluation.reconstructed_cells import decoded_from_training, gaussian_latents, reconstructed

    seed, most = config.evaluate.seed, config.evaluate.max_cells
    few = at_most(test, most, max(50, config.evaluate.min_cells), seed)
    there = train.numbers()
    numbers = {t: min(n, there[t]) for t, n in few.numbers().items() if t in there}
    rng = np.random.default_rng([seed, 6])
    parts = {
        "reconstructed": Part(
            "reconstructed",
            "test cells, encoded and decoded again: what they lack, the autoencoder lacks",
            reconstructed(model, few, seed),
        )
    }
    if not numbers:  # training cells have none of these combinations
        return parts
    return parts | {
        "from_training": Part(
            "from training latents",
            "cells decoded from the training cells' own latents: what a perfect diffusion model would generate",
            decoded_from_training(model, train, numbers, rng),
        ),
        "gaussian": Part(
            "Gaussian latents",
            "a Gaussian for each combination in place of the diffusion model",
            gaussian_latents(model, train, numbers, rng),
        ),
    }


def at_most(cells: Cells, n: int, least: int, seed: int) -> Cells:
    """At most n of the cells in their shares. Of each combination `least`, or what there is."""
    if len(cells) <= n:
        return cells
    numbers = {t: max(min(k, least), k * n // len(cells)) for t, k in cells.numbers().items()}
    return cells.select(rows_per_type(cells.types, numbers, np.random.default_rng([seed, 7])))


# --- what stands beside the scores ---------------------------------------------------------------------------------


def loss_curves(run: str, stage: str) -> dict:
    """Raises: InputError where the run has no metrics."""
    curves = curves_of(read_metrics(run))
    if not curves:
        raise InputError(f"{stage}={run}: no metrics.jsonl with metrics in it. Give the folder of a training run")
    return curves


def flat_scores(evaluation: dict) -> dict[str, float]:
    """The numbers that MLflow gets, as far as there are any: scores, their errors, floors and normalised scores, pooled
    and means. Memorisation, responses, the parts' scores, the share of markers up.

    MLflow shows the charts of one name before the last slash together.
    """
    out: dict[str, float] = {}
    for section in score_sections(evaluation):
        for name, row in evaluation[section].items():
            out[f"{section}/{name}"] = row["score"]
            out[f"{section}/floor/{name}"] = row["floor"]["mean"]
            if row["error"] is not None:
                out[f"{section}/error/{name}"] = row["error"]
            out |= {f"{section}/of_{k}/{name}": v for k, v in row["normalised"].items() if v is not None}
        for side, of in sides_of_parts(evaluation).items():
            out |= {f"parts/{section}/{side}/{name}": value for name, value in of.get(section, {}).items()}
    out |= {name: row["score"] for name, row in evaluation["memorisation"].items()}
    for condition, response in evaluation["response"].items():
        scores = response["pooled"].items()
        out |= {f"response/{condition}/{name}": s["value"] for name, s in scores if s["value"] is not None}
    up = [m["log2_fold_change"]["generated"] > 0 for m in evaluation.get("markers", [])]
    return {**out, "markers_up": float(np.mean(up))} if up else out


def sides_of_parts(evaluation: dict) -> dict[str, dict]:
    """Floor, the model's parts and generated cells, all scored at equal numbers. None without parts."""
    beside = evaluation["beside_parts"]
    return {"floor": beside["floor"], **evaluation["parts"], "generated": beside["generated"]} if beside else {}


# --- the tables in the terminal ------------------------------------------------------------------------------------


def show(evaluation: dict, report: Path) -> None:
    """Scores, the parts of the model, responses, the verdict."""
    terminal, title = console(140), evaluation["protocol"]["title"]
    names = {"per_combination": "per combination (mean)", "pooled": "pooled (all cells at once)"}
    baselines = baselines_of(evaluation)
    for section in score_sections(evaluation):
        columns = ["generated", "± 95 %", "floor", *(f"({k})" for k in baselines)]
        table = started(f"scores {names[section]}, protocol {title}", columns)
        for name, row in evaluation[section].items():
            generated, floor, *others = (mean for mean, _ in row_texts(row))
            beaten = [f"{text} {MARKS[row['beats'][k]]}" for k, text in zip(baselines, others, strict=True)]
            table.add_row(METRICS[name].title, generated, reach(row), floor, *beaten)
        terminal.print(table)
    if sides := sides_of_parts(evaluation):
        section = "per_combination" if "per_combination" in sides["floor"] else "pooled"
        about = f"which part costs what: {names[section]}, {evaluation['beside_parts']['n_cells']:,} cells of each"
        table = started(f"{about}, protocol {title}", [of.get("title", side) for side, of in sides.items()])
        for name in sides["floor"][section]:
            values = [of[section].get(name) for of in sides.values()]
            table.add_row(METRICS[name].title, *("" if v is None else f"{v:.3g}" for v in values))
        terminal.print(table)
    show_responses(terminal, evaluation)
    table = started(f"memorisation, protocol {title}", ["generated", "± 95 %"])
    for name, row in evaluation["memorisation"].items():
        table.add_row(MEMORISATION[name].title, f"{row['score']:.3g}", reach(row))
    terminal.print(table)
    for line in notes(evaluation):
        terminal.print(line, soft_wrap=True)
    for figure, text in tiles(evaluation):
        terminal.print(f"{figure:>9}  {text}", soft_wrap=True)
    terminal.print(matched_text(evaluation))
    terminal.print(f"{evaluation['verdict']['says']} {evaluation['verdict']['next']}", soft_wrap=True)
    terminal.print(f"report: {report}", soft_wrap=True)


def reach(row: dict) -> str:
    """How far a score's 95 % interval reaches to either side."""
    return "" if row["error"] is None else f"{WIDTH * row['error']:.2g}"


def show_responses(terminal: Console, evaluation: dict) -> None:
    """Pooled over the contrasts of each condition."""
    for condition, response in evaluation["response"].items():
        if not response["pooled"]:
            continue
        title = f"response to {condition} (control: {response['control']}), the same under every protocol: all genes"
        table = started(title, ["generated", "95 %", "real cells"])
        for name, row in response["pooled"].items():
            interval = f"{row['low']:.2f} to {row['high']:.2f}" if "low" in row else ""
            texts = ["" if v is None else f"{v:.2f}" for v in (row["value"], row["ceiling"])]
            table.add_row(name.replace("_", " "), texts[0], interval, texts[1])
        terminal.print(table)


def notes(evaluation: dict) -> list[str]:
    """How to read the tables, and what was left out."""
    listed = "; ".join(f"({k}) {title}" for k, (title, *_) in baselines_of(evaluation).items())
    out = [
        f"floor: the training cells themselves. Baselines drawn from them: {listed}",
        "✓ generated cells are closer to the test cells than the baseline. ✗ they are not. \N{EN DASH} the baseline is "
        "no worse than the floor",
    ]
    out += evaluation["notes"]
    if evaluation["pooled_only"]:
        out.insert(0, evaluation["pooled_only"])
    if evaluation["cells"]["drawn_of"]:
        out.insert(0, drawn_text(evaluation))
    return out
