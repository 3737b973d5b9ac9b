"""Results as a table of text, and as JSON.

Reading order: Results, print_tables, to_json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality import judge
from benchmarks.quality.methods import METHODS
from launch.bench.report import Report, Row

COLUMNS = 8  # metrics side by side
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

    def best(self, scope: str, metric: str) -> list[str]:
        """The methods nearest to the best end, controls aside; several where they tie."""
        losses: dict[str, float] = {}
        for method in self.scores:
            value = self.mean(method, scope, metric)
            loss = None if value is None else judge.loss_of(metric, value)
            if loss is not None and METHODS[method].kind != "control":
                losses[method] = loss
        least = min(losses.values(), default=None)
        return [method for method, loss in losses.items() if loss == least]

    def impossible(self, method: str) -> dict[str, list[str]]:
        """Why -> the combinations that the method has none of, for that reason."""
        out: dict[str, list[str]] = {}
        for key, why in {k: v for row in self.rows[method].values() for k, v in row["impossible"].items()}.items():
            out.setdefault(why, []).append(key)
        return out


def print_tables(results: Results) -> None:
    """A table for each scope, methods as rows; `*` marks the best method that is not a control."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=220 if not Console().is_terminal else None)
    for scope, meaning in judge.SCOPES.items():
        metrics = results.metrics(scope)
        for start in range(0, len(metrics), COLUMNS):
            few = metrics[start : start + COLUMNS]
            best = {metric: results.best(scope, metric) for metric in few}
            console.print(f"\n{scope.replace('_', ' ')}: {meaning}", highlight=False)
            table = Table()
            table.add_column("method", no_wrap=True)
            for metric in few:
                table.add_column(judge.title_of(metric), justify="right")
            for method in results.scores:
                values = {metric: results.mean(method, scope, metric) for metric in few}
                if any(value is not None for value in values.values()):
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
    for method in results.rows:
        for why, keys in results.impossible(method).items():
            console.print(f"{method}, {named(keys)}: {why}", highlight=False, markup=False)


def named(keys: list[str]) -> str:
    """The combinations by name, or their number where they are many."""
    return " and ".join(keys) if len(keys) <= 2 else f"{len(keys)} combinations"


def number(value: float | None, is_best: bool = False) -> str:
    text = "" if value is None else f"{value:.4g}" if abs(value) >= 0.01 or value == 0 else f"{value:.5f}"
    return f"[bold]{text} *[/bold]" if is_best else text


def to_json(results: Results, settings: dict[str, Any], command: str) -> dict[str, Any]:
    """The report of one number a row, means over the seeds, and under `methods` what every seed gave."""
    report = Report("quality", settings, command=command)
    for method in results.scores:
        for scope in judge.SCOPES:
            for metric in results.metrics(scope):
                name = f"{method}: {judge.title_of(metric)}, {scope.replace('_', ' ')}"
                value = results.mean(method, scope, metric)
                if value is not None:
                    report.add(Row(name, round_to(value), "nats a cell" if metric == judge.TEST_NLL else ""))
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
                    "scores": {scope: rounded(of[scope]) for scope in judge.SCOPES if scope in of},
                }
                for seed, of in seeds.items()
            },
        }
        for method, seeds in results.scores.items()
    }
    out = report.to_json()
    assert {"command", "commit", "device", "rows"} <= set(out)
    return {**out, "methods": methods}


def rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round_to(value) for name, value in scores.items()}


def round_to(value: float, digits: int = 5) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")
