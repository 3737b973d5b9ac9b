"""Results as a table of text, and as JSON.

Reading order: Results, print_tables, to_json, kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from benchmarks.quality import judge
from benchmarks.quality.methods import METHODS, ours
from benchmarks.report import Report, Row
from scldm.errors import InputError, read_json

COLUMNS = 8  # metrics side by side
FLOOR = "training_cells"
COSTS = {"train_cpu_s": "training", "draw_cpu_s": "drawing"}


@dataclass(frozen=True)
class Results:
    """scores: method -> seed -> scope -> metric -> score; rows: method -> seed -> note of the row"""

    scores: Mapping[str, Mapping[int, Mapping[str, Any]]]
    rows: Mapping[str, Mapping[int, Mapping[str, Any]]]

    def metrics(self, scope: str) -> list[str]:
        """Those that some method has, those of the figure first."""
        found = [m for of in self.scores.values() for s in of.values() for m in s.get(scope, {})]
        return sorted(
            dict.fromkeys(found), key=lambda m: judge.DRAWN.index(m) if m in judge.DRAWN else len(judge.DRAWN)
        )

    def values(self, method: str, scope: str, metric: str) -> list[float]:
        """A score of every seed; empty where the method has none."""
        return [s[scope][metric] for s in self.scores[method].values() if metric in s.get(scope, {})]

    def mean(self, method: str, scope: str, metric: str) -> float | None:
        values = self.values(method, scope, metric)
        return float(np.mean(values)) if values else None

    def floor(self, scope: str, metric: str) -> float | None:
        """The training cells' mean score."""
        return self.mean(FLOOR, scope, metric) if FLOOR in self.scores else None

    def best(self, scope: str, metric: str) -> list[str]:
        """The method whose mean is nearest to the best end, and those whose mean is no worse than its worst seed.
        Controls are left aside."""
        floor, losses = self.floor(scope, metric), dict[str, float]()
        for method in self.scores:
            value = self.mean(method, scope, metric)
            loss = None if value is None else judge.loss_of(metric, value, floor)
            if loss is not None and METHODS[method].kind != "control":
                losses[method] = loss
        if not losses:
            return []
        first = min(losses, key=lambda method: losses[method])
        of_seeds = [judge.loss_of(metric, value, floor) for value in self.values(first, scope, metric)]
        limit = max([losses[first], *(loss for loss in of_seeds if loss is not None)])
        return [method for method, loss in losses.items() if loss <= limit]

    def impossible(self, method: str) -> dict[str, list[str]]:
        """Why -> the combinations that the method has none of, for that reason."""
        out: dict[str, list[str]] = {}
        for key, why in {k: v for row in self.rows[method].values() for k, v in row["impossible"].items()}.items():
            out.setdefault(why, []).append(key)
        return out


def print_tables(results: Results, kept: Mapping[str, Mapping[str, Any]]) -> None:
    """A table for each scope, methods as rows: mean over seeds ± half their range. `*` marks the best method that is
    not a control, and those within its range.

    kept: method -> where its rows come from, of those that this run did not make
    """
    from rich.console import Console
    from rich.table import Table

    # labels are no markup
    console = Console(width=220 if not Console().is_terminal else None, highlight=False, markup=False, emoji=False)
    console.print(f"protocol: {judge.TITLE}, {judge.MEANING}", soft_wrap=True)
    console.print("numbers: mean over seeds ± half their range; * the best, and those within its range", soft_wrap=True)
    for scope, meaning in judge.SCOPES.items():
        metrics = results.metrics(scope)
        for start in range(0, len(metrics), COLUMNS):
            few = metrics[start : start + COLUMNS]
            best = {metric: results.best(scope, metric) for metric in few}
            console.print(f"\n{scope.replace('_', ' ')}, protocol {judge.TITLE}: {meaning}")
            table = Table()
            table.add_column("method", no_wrap=True)
            for metric in few:
                table.add_column(judge.title_of(metric), justify="right")
            for method in results.scores:
                values = {metric: results.values(method, scope, metric) for metric in few}
                if any(values.values()):
                    cells = [number(values[m], method in best[m]) for m in few]
                    table.add_row(method, *cells, style="dim" if METHODS[method].kind == "control" else "")
            console.print(table)
    console.print("\nCPU-seconds, mean over seeds")
    table = Table()
    for name in ("method", *COSTS.values(), "what it is"):
        table.add_column(name, justify="left" if name in ("method", "what it is") else "right")
    for method, rows in results.rows.items():
        costs = [f"{np.mean([row[key] for row in rows.values()]):.0f}" for key in COSTS]
        table.add_row(method, *costs, METHODS[method].title)
    console.print(table)
    if any(METHODS[method].kind == "ours" for method in results.rows):
        console.print(ours.NOTE, soft_wrap=True)
    for method, of in kept.items():
        console.print(f"{method}: not made by this run, kept from one of commit {of['commit']}", soft_wrap=True)
    for method in results.rows:
        for why, keys in results.impossible(method).items():
            console.print(f"{method}, {named(keys)}: {why}", soft_wrap=True)


def named(keys: list[str]) -> str:
    """The combinations by name, or their number where they are many."""
    return " and ".join(keys) if len(keys) <= 2 else f"{len(keys)} combinations"


def number(values: Sequence[float], is_best: bool = False) -> Text:
    """Mean ± half the range, which one seed has not; bold with a star where it is among the best."""
    if not values:
        return Text("")
    mean = float(np.mean(values))
    text = f"{mean:.4g}" if abs(mean) >= 0.01 or mean == 0 else f"{mean:.5f}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.2g}"
    return Text(f"{text} *", "bold") if is_best else Text(text)


def to_json(results: Results, settings: dict[str, Any], command: str) -> dict[str, Any]:
    """The report of one number a row, means over the seeds, and under `methods` what every seed gave."""
    report = Report("quality", settings, command=command)
    for method in results.scores:
        for scope in judge.SCOPES:
            for metric in results.metrics(scope):
                name = f"{method}: {judge.title_of(metric)}, {scope.replace('_', ' ')}"
                value = results.mean(method, scope, metric)
                if value is not None:
                    report.add(Row(name, round_to(value), "nats a cell" if metric == "test_nll" else ""))
        for why, keys in results.impossible(method).items():
            report.add(Row.not_measured(f"{method}: {named(keys)}", why, ""))
        for cost, of in COSTS.items():
            seconds = float(np.mean([row[cost] for row in results.rows[method].values()]))
            report.add(Row(f"{method}: CPU time, {of}", round_to(seconds), "s"))
    methods = {
        method: {
            "title": METHODS[method].title,
            "seeds": {
                str(seed): {
                    "row": {k: v for k, v in results.rows[method][seed].items() if k not in ("method", "seed")},
                    "scores": scopes_of(of),
                }
                for seed, of in seeds.items()
            },
        }
        for method, seeds in results.scores.items()
    }
    out = report.to_json()
    assert {"command", "commit", "device", "rows"} <= set(out)
    return {**out, "methods": methods}


def kept(path: Path, made: Results, settings: Mapping[str, Any], same: Sequence[str]) -> tuple[Results, dict[str, Any]]:
    """The results of a run, with those of an earlier one's JSON for the methods that it did not make, and where these
    come from.

    same: settings that both must have alike

    Raises: InputError where they are of other cells or seeds, or the floor, which both must have, was scored otherwise.
    """
    of, now = read_json(path), json.loads(json.dumps(settings))
    for key in same:
        if (before := of["settings"].get(key)) != now[key]:
            raise InputError(f"keep={path}: its {key} is {before!r}, and this run's {now[key]!r}")
    rows, scores = dict(made.rows), dict(made.scores)
    floor = {str(seed): scopes_of(of_seed) for seed, of_seed in scores.get(FLOOR, {}).items()}
    theirs = {seed: found["scores"] for seed, found in of["methods"].get(FLOOR, {"seeds": {}})["seeds"].items()}
    if not floor or floor != theirs:
        raise InputError(f"keep={path}: its {FLOOR} are not scored as this run's. Judge or make its methods again")
    names = [name for name in of["methods"] if name not in scores and name in METHODS]
    models = {METHODS[name].model for name in scores} - {""}
    if others := [name for name in names if METHODS[name].model in models]:
        raise InputError(f"keep={path}: {others[0]} is of a model that this run trains anew. Name it in methods too")
    for name in names:
        seeds = of["methods"][name]["seeds"]
        rows[name] = {int(seed): found["row"] for seed, found in seeds.items()}
        scores[name] = {int(seed): found["scores"] for seed, found in seeds.items()}
    ordered = [name for name in METHODS if name in scores]
    results = Results({name: scores[name] for name in ordered}, {name: rows[name] for name in ordered})
    own = {key: of[key] for key in ("commit", "command", "device")} | {"seconds": of["settings"]["seconds"]}
    before = of["settings"].get("kept", {})
    return results, {name: before.get(name, own) for name in names}


def scopes_of(scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of one row, as JSON has them."""
    return {scope: rounded(scores[scope]) for scope in judge.SCOPES if scope in scores}


def rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round_to(value) for name, value in scores.items()}


def round_to(value: float, digits: int = 5) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")
