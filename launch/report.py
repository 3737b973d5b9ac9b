"""`scldm report RUN [RUN2]`: what was trained on what, how it went and where it is weak, from the run's own files.

Reading order: main, facts, its groups, the evaluations beside a run, where it is weak.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from launch.cluster.status import state_of_run, training, training_config
from launch.config import compose, preset_names, with_folders
from launch.evaluation.gate import RISE, line_of, read_gate
from launch.followed import dataset_of
from scldm.errors import InputError, json_of
from scldm.evaluate.curves import curves_of
from scldm.evaluate.figures.scores import place, score_sections
from scldm.evaluate.intervals import WIDTH
from scldm.evaluate.metrics import METRICS
from scldm.evaluate.report_tables import row_texts
from scldm.evaluate.run_page import run_page
from scldm.files import flat, write_page
from scldm.given_json import Count, PathText, known_of, read_checked, read_known
from scldm.train.follower import row_files, row_of
from scldm.train.run_folder import PREVIEWS, outcome_of, starts_of
from scldm.train.run_state import comparable
from scldm.train.tracked import read_note
from scldm.train.tracking import read_metrics
from scldm.vocab import ConditionVocab

PURPOSE = """One page on a training run, or on two beside each other, by the files in their folders. It shows data set,
settings, curves, the gate, scores of an evaluation beside the run, weak points, throughput, restarts and environment.
An evaluation lies beside RUN if its evaluation.json is in RUN, in RUN's parent, or one folder below either."""
EXAMPLE = """
scldm report runs/vae
scldm report runs/ldm runs/ldm-low out=compared.html
"""
SECTIONS = {"per_combination": "mean over combinations", "pooled": "all cells at once"}
WAITS = 0.1  # share of the time from which on a loader is worth a look


@dataclass(frozen=True)
class ReportConfig:
    """What to report on.

    runs: folder of a training run, or of two. Given as the first words
    out: HTML file to write. Empty means run.html in the first run's folder, of two runs.html
    """

    runs: tuple[str, ...]
    out: str = ""

    def __post_init__(self) -> None:
        if len(self.runs) not in (1, 2) or len({Path(run).resolve() for run in self.runs}) < len(self.runs):
            raise InputError(f"runs={', '.join(self.runs)}: give the folder of one run, or of two different ones")


CONFIG = ReportConfig
USAGE = "scldm report RUN [RUN2] [key=value ...]"


def read(words: Sequence[str]) -> ReportConfig:
    """Words without `=` are folders."""
    return compose(ReportConfig, with_folders(ReportConfig, "runs", words))


def main(config: ReportConfig) -> Path:
    """Write the page, and print what matters most. Returns the page."""
    runs = [facts(Path(run)) for run in config.runs]
    out = Path(config.out or Path(config.runs[0]) / ("run.html" if len(runs) == 1 else "runs.html"))
    write_page(out, run_page(runs).encode())
    for run in runs:
        print(f"{run['name']}: {run['headline']}")
        for sentence in run["weak"]:
            print(f"  weak: {sentence}")
    print(f"{out}: the page, with curves and all numbers")
    return out


# --- facts ---------------------------------------------------------------------------------------------------------


def facts(run: Path) -> dict[str, Any]:
    """What the page tells of a run, see scldm/evaluate/run_page.py.

    Raises: InputError for a folder that is no training run's.
    """
    config, rows = training_config(run), read_metrics(run)
    starts = starts_of(run)
    known_of(_Data, config.get("data"), f"{run}/config.json: data")
    train = [row for row in rows if row["split"] == "train"]
    judged, wrong = gate_of_run(run, config), weak(run, config, rows, starts)
    for path, evaluation in evaluations(run):
        scored, beyond = scores(path, evaluation)
        judged, wrong = judged | scored, wrong + beyond
    trained, preview = outcome(run, config, rows), max((run / PREVIEWS).glob("step-*.png"), default=None)
    groups = {
        "training": {**trained, **(described(config, starts))},
        "data": data(run, config),
        "scores": judged,
        "throughput": throughput(run, train),
        "starts and changes": starts_told(run, starts),
        "environment": environment(starts),
    }
    return {
        "name": str(run),
        "headline": "; ".join(trained[key] for key in ("state", "step", "best validation") if key in trained),
        "weak": wrong,
        "groups": groups,
        "curves": curves_of(rows),
        "preview": preview.read_bytes() if preview else None,
        "settings": {key: str(value) for key, value in flat(config)},
    }


@dataclass(frozen=True)
class _Data:
    shards: str


def metric_of(config: Mapping[str, Any]) -> str:
    """What is judged on validation cells: of `train ldm`, whether its latents are stored or made, the flow's loss."""
    return "velocity_loss" if "flow" in config else "nll"


def outcome(run: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    out = {"state": state_of_run(run)}
    if rows:
        steps, last = config["train"]["steps"], rows[-1]
        out["step"] = f"step {last['step']:,} of {steps:,}, {last['cells_seen']:,} cells seen"
    if judged := validated(config, rows):
        name = metric_of(config)
        best = min(comparable(judged), key=lambda row: row[name])
        out["best validation"] = f"{name} {best[name]:.4g} at step {best['step']:,}"
        out["last validation"] = f"{name} {judged[-1][name]:.4g} at step {judged[-1]['step']:,}"
    return out


def validated(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["split"] == "validation" and row.get(metric_of(config)) is not None]


def described(config: Mapping[str, Any], starts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    if not starts:
        return {}
    known = set(preset_names(("vae", "ldm", "hardware")))
    words = shlex.split(starts[0]["command"])
    presets = [word for word in words[1:] if word in known or word.endswith((".yaml", ".yml"))]
    given = {"command": starts[0]["command"], "presets": ", ".join(presets), "init_from": config.get("init_from", "")}
    return {key: value for key, value in given.items() if value}


def data(run: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The set, as it was when the run began, where tracking noted it. Else as it lies there now."""
    shards = config["data"]["shards"]
    out = {"shards": shards}
    noted = (read_note(run) or {"datasets": []})["datasets"]
    if not noted:
        try:
            noted = [dataset_of(shards, "training")]
        except (InputError, OSError):  # a set that is gone
            return out
    profile = dict(noted[0]["profile"])
    out |= {"manifest": noted[0]["digest"]} | {key: str(profile.pop(key)) for key in ("kind",) if key in profile}
    out |= {key.replace("n_", ""): f"{n:,}" for key, n in profile.items()}
    if (run / "conditions.json").is_file():
        of = ConditionVocab.load(run / "conditions.json")
        out["conditions"] = ", ".join(f"{name} ({of.n_labels(name):,} labels)" for name in of.names) or "none"
    return out


def throughput(run: Path, train: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Medians of the logged rows: the first one of a start holds what is compiled and opened."""
    names = {
        "cells_per_s": ("cells/s, all ranks", "{:,.0f}"),
        "cells_per_s_rank": ("cells/s of a rank", "{:,.0f}"),
        "step_s": ("seconds a step", "{:.3g}"),
        "waiting_share": ("waiting for cells", "{:.1%}"),
        "mfu": ("share of peak FLOP/s", "{:.1%}"),
        "memory_gb": ("most memory of a rank", "{:.2f} GB"),
    }
    out = {}
    for key, (title, form) in names.items():
        if values := [row[key] for row in train if row.get(key) is not None]:
            out[title] = form.format(max(values) if key == "memory_gb" else median(values))
    return out | system_of(run)


def system_of(run: Path) -> dict[str, str]:
    """How much of each node was used: medians over time. Of several nodes, the middle, the least and the most used."""
    found: dict[str, dict[str, list[float]]] = {}
    for path in [run / name for name in row_files(run)[1:]]:  # the first has the metrics
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
            row = row_of(line, path) or {}
            node = str(row.get("split", "")).partition("/")[2] or "first host"
            for key, value in row.items():
                if isinstance(value, int | float) and key.endswith(("percentage", "percent")):
                    found.setdefault(key.replace("_", " "), {}).setdefault(node, []).append(value)
    out = {}
    for key, nodes in sorted(found.items()):
        medians = sorted((median(values), node) for node, values in nodes.items())
        (least, at_least), (most, at_most) = medians[0], medians[-1]
        if len(medians) == 1:
            out[f"{key}, {at_least}"] = f"{least:.0f} %"
        else:
            middle = median(value for value, _ in medians)
            out[f"{key}, {len(medians)} nodes"] = f"{middle:.0f} %, {least:.0f} ({at_least}) to {most:.0f} ({at_most})"
    return out


def starts_told(run: Path, starts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    out = {"starts": str(len(starts))}
    for k, start in enumerate(starts):
        job = f", job {start['slurm_job']}" if start.get("slurm_job") else ""
        commit = f", commit {start['git'][:12]}{'-dirty' * start['git'].endswith('-dirty')}" if start["git"] else ""
        out[f"start {k + 1}"] = f"{start['time']} on {start['host']}{job}{commit}"
    told = [
        (name, text)
        for name, text in training(run, with_outcome=False)
        if name == "changed" or name.startswith("rank-")
    ]
    return out | {f"{name}, {k + 1}" if name == "changed" else name: text for k, (name, text) in enumerate(told)}


def environment(starts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of the last start."""
    if not starts:
        return {}
    last = starts[-1]
    keys = ("git", "platform", "cpus", "python", "attention")
    return {key: str(last[key]) for key in keys if last.get(key)} | dict(last["versions"])


def gate_of_run(run: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """What was found of the autoencoder, this run's or that of its latents."""
    if line := line_of(run):
        return {"gate": line}
    gate = read_gate(Path(config["data"]["shards"]))
    return {"gate of the autoencoder": gate["line"]} if gate else {}


# --- scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evaluation:
    """What tells of which run an evaluation is. Each part of it holds more."""

    made_with: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _MadeWith:
    vae: PathText = ""
    ldm: PathText = ""
    model: PathText = ""


@dataclass(frozen=True)
class _Judged:
    folder: PathText = ""


@dataclass(frozen=True)
class _Exported:
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Origin:
    run: PathText = ""


def evaluations(run: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Evaluations beside a run that name it, or a model that was exported from it."""
    places = [
        path for at in (run, run.resolve().parent) for glob in ("", "*/") for path in at.glob(f"{glob}evaluation.json")
    ]
    for path in sorted({path.resolve() for path in places}):
        evaluation = read_checked(_Evaluation, path) or {}
        made = known_of(_MadeWith, evaluation.get("made_with", {}), f"{path}: made_with")
        named = [made.vae, made.ldm, known_of(_Judged, evaluation.get("vae", {}), f"{path}: vae").folder]
        model = Path(made.model) / "config.json"
        if made.model and model.is_file():
            origin = read_known(_Exported, model).origin
            named += [known_of(_Origin, of, f"{model}: origin").run for of in origin.values() if isinstance(of, dict)]
        if any(name and is_at(run, name) for name in named):
            yield path, evaluation


def is_at(run: Path, name: str) -> bool:
    """Whether a path names this folder: from here, or from where the evaluation was made."""
    ends = tuple(part for part in Path(name).parts if part not in ("..", "."))
    return Path(name).resolve() == run.resolve() or run.resolve().parts[-len(ends) :] == ends


def scores(path: Path, e: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Rows of an evaluation, and where it says that the model is weak."""
    name = f"evaluation {path.parent.name}"
    try:
        return _of_autoencoder(name, e) if "scores" in e else _of_generated(name, e)
    except KeyError as error:
        return {name: f"not shown, as it has no {error}: another version of scldm made it. Evaluate again"}, []
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return {name: f"not shown, as it is damaged ({error}). Evaluate again"}, []


def _of_autoencoder(name: str, e: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    out = {name: e["verdict"]}
    for of, score in e["scores"].items():
        error = "" if score["re"]["se"] is None else f" ± {WIDTH * score['re']['se']:.1f}"
        out[f"nats a test cell, {of.replace('_', ' ')}"] = f"{score['re']['mean']:.1f}{error}"
    return out, []


def _of_generated(name: str, e: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The protocol's main scores. Weak are the verdict's next step, and what stands farthest beyond the baselines."""
    out, section = {name: e["verdict"]["says"]}, score_sections(dict(e))[0]
    for m in e["protocol"]["main"]:
        (score, reach), (floor, _), *_ = row_texts(row := e[section][m])
        stands = "" if (at := place(row)) is None else f", {at:.2f} of the way to the best baseline"
        out[f"{METRICS[m].title}, {SECTIONS[section]}"] = f"{score}{f' ± {reach}' * bool(reach)}, floor {floor}{stands}"
    tables = {"all cells": e["pooled"], **e.get("by_combination", {})}
    at = {(of, m): p for of, table in tables.items() for m, row in table.items() if (p := place(row)) is not None}
    worst = sorted((key for key in at if at[key] > 1), key=lambda key: -at[key])[:3]
    told = ", ".join(f"{METRICS[m].title} of {of} ({at[of, m]:.1f})" for of, m in worst)
    return out, [
        e["verdict"]["next"],
        *([f"Farther from real cells than the best baseline (1) are {told}."] if told else []),
    ]


# --- where it is weak ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Skipped:
    step: Count


def weak(
    run: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]
) -> list[str]:
    """A sentence for each weakness that the run's own files show."""
    out, name, judged = list[str](), metric_of(config), validated(config, rows)
    if (gate := read_gate(run)) and gate["passed"] is False:
        out.append(f"The autoencoder is {gate['line']}.")
    if not judged:
        out.append("It was never validated.")
    else:
        best, last = min(comparable(judged), key=lambda row: row[name]), judged[-1]
        if best is last and (ended := outcome_of(run)) and ended.state == "finished":
            steps = config["train"]["steps"]
            out.append(f"Validation was at its best at the last step: train on, with more than train.steps={steps}.")
        elif last[name] - best[name] > RISE * abs(best[name]):
            out.append(
                f"Validation rose from {best[name]:.4g} at step {best['step']:,} to {last[name]:.4g}: it overfits."
            )
    waits = [row["waiting_share"] for row in rows if row.get("waiting_share") is not None]
    if waits and median(waits) > WAITS:
        out.append(f"{median(waits):.0%} of the time it waits for cells: raise data.read_threads or data.prefetch.")
    if (run / "nonfinite.jsonl").is_file():
        *lines, _ = (run / "nonfinite.jsonl").read_text().split("\n")  # the last one may be under way
        path = run / "nonfinite.jsonl"
        steps = {known_of(_Skipped, json_of(line.encode(), path), str(path)).step for line in lines}
        out.append(f"{len(steps)} steps were skipped, as their gradient was not finite: nonfinite.jsonl has the cells.")
    if any((start["git"] or "").endswith("-dirty") for start in starts):
        noted = ", ".join(dict.fromkeys(start["diff"] for start in starts if "diff" in start))
        out.append(f"Tracked files differed from the commit: {noted or 'the run can not be made again from it'}.")
    if len({start["git"] for start in starts}) > 1 or len({json.dumps(s["versions"]) for s in starts}) > 1:
        out.append("Its starts ran different commits or versions.")
    return out
