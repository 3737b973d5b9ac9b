"""What `python -m benchmarks.sustained` makes of its two runs: rows, and a figure over time.

Reading order: Sample, rows, stretches, draw.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.report import Row
from scldm.train.tracking import read_metrics

NAMES = ("disturbed", "undisturbed")


@dataclass(frozen=True)
class Sample:
    """Of one rank.

    t: wall seconds since the run was submitted
    step: the run's last logged one
    rss_gb: resident memory of its process, which began with pid
    cpu_s: CPU seconds of that process
    """

    t: float
    step: int
    rank: int
    pid: int
    rss_gb: float
    cpu_s: float


def rows(out: Path) -> Iterator[Row]:
    """Losses of both runs at the same steps, and memory and CPU time of the first rank at each start."""
    ours, theirs = (by_step(out / name) for name in NAMES)
    both = sorted(ours.keys() & theirs.keys())
    changed = next((k for k in both if n_ranks(ours[k]) != n_ranks(theirs[k])), max(both) + 1)
    before, after = [k for k in both if k < changed], [k for k in both if k >= changed]
    yield Row("disturbed: steps", max(ours), "")
    yield Row("undisturbed: steps", max(theirs), "")
    yield Row("both, before the number of ranks changes: steps", len(before), "")
    yield Row.at_most("there, largest relative difference of a loss", apart(ours, theirs, before), "", 0.0)
    if after:
        yield Row("both, from then on: steps", len(after), "")
        yield Row.at_most("there, largest relative difference of a loss", apart(ours, theirs, after), "", 1e-3)
    for name in NAMES:
        for k, samples in enumerate(stretches(out, name), 1):
            first, last = samples[0], samples[-1]
            what = f"{name}, start {k}, {ranks_told(out, name, samples)}, steps {first.step} to {last.step}"
            quarters = np.array_split([s.rss_gb for s in samples], 4)
            yield Row(f"{what}: wall time of a step", (last.t - first.t) / (last.step - first.step), "s")
            yield Row(f"{what}: CPU time of a step, median", median(cpu for _, cpu in of_steps(samples)), "s")
            yield Row(f"{what}: memory in its last quarter, median", float(np.median(quarters[3])), "GB")
            growth = float(np.median(quarters[3]) / np.median(quarters[1]))  # the first has its first checkpoint
            yield Row.at_most(f"{what}: memory, last quarter over second", growth, "x", 1.05)


def of_steps(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """(wall time at its end, CPU time) of each step or few steps between two samples. What follows a step, such as a
    validation, is part of the next one."""
    changes = [b for a, b in pairwise(samples) if b.step > a.step]
    return [(b.t, (b.cpu_s - a.cpu_s) / (b.step - a.step)) for a, b in pairwise(changes)]


def by_step(run: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in read_metrics(run, "train")}


def n_ranks(row: Mapping[str, float]) -> int:
    return round(row["cells_per_s"] / row["cells_per_s_rank"])


def apart(ours: Mapping[int, Any], theirs: Mapping[int, Any], steps: Sequence[int]) -> float:
    return max((abs(ours[k]["loss"] / theirs[k]["loss"] - 1) for k in steps), default=0.0)


def samples_of(out: Path, name: str) -> list[Sample]:
    return [Sample(**json.loads(line)) for line in Path(f"{out / name}.samples.jsonl").read_text().splitlines()]


def stretches(out: Path, name: str) -> list[list[Sample]]:
    """The samples of the first rank at each start, from its second step to its last but one: what follows the last step
    of a run, as the gate does, is no training."""
    found: dict[int, list[Sample]] = {}
    for sample in samples_of(out, name):
        if sample.rank == 0:
            found.setdefault(sample.pid, []).append(sample)
    trained = [[s for s in of if of[0].step + 1 < s.step < of[-1].step] for of in found.values()]
    return [of for of in trained if of and of[-1].step > of[0].step]


def ranks_told(out: Path, name: str, stretch: Sequence[Sample]) -> str:
    """How many ranks ran then. Rows of lost steps were written again, perhaps by another number."""
    n = len({s.rank for s in samples_of(out, name) if stretch[0].t <= s.t <= stretch[-1].t})
    return f"{n} ranks" if n > 1 else "1 rank"


def draw(out: Path, path: Path) -> None:
    """Losses by step, then CPU time of a step and memory over the time of the disturbed run, with its disturbances."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    events = [json.loads(line) for line in Path(f"{out / NAMES[0]}.events.jsonl").read_text().splitlines()]
    figure, (loss, rate, memory) = plt.subplots(3, 1, figsize=(8, 7.5), layout="constrained")
    for name, style in zip(NAMES, ("-", ":"), strict=True):
        table = by_step(out / name)
        loss.plot(list(table), [row["loss"] for row in table.values()], style, label=name, linewidth=1.2)
    loss.set(xlabel="step", ylabel="loss in nats")
    loss.set_ylim(top=np.percentile([row["loss"] for row in by_step(out / NAMES[0]).values()], 99) * 1.1)
    loss.legend(frameon=False, loc="upper left")
    samples = samples_of(out, NAMES[0])
    usual = median(cpu for of in stretches(out, NAMES[0]) for _, cpu in of_steps(of))
    for of in stretches(out, NAMES[0]):
        rate.plot(*zip(*of_steps(of), strict=True), ".", color="C0", markersize=3)
        rate.annotate(ranks_told(out, NAMES[0], of), (of[len(of) // 2].t, 0.1 * usual), ha="center", fontsize=8)
    rate.set(ylabel="CPU s of a step,\nfirst rank", ylim=(0, 3 * usual), xlim=(0, samples[-1].t))
    for rank in (0, 1):
        of = [s for s in samples if s.rank == rank]
        memory.plot([s.t for s in of], [s.rss_gb for s in of], ".", markersize=2.5, label=f"rank {rank}")
    memory.set(
        ylabel="resident memory, GB",
        xlabel="seconds since the run was submitted",
        ylim=(0, None),
        xlim=(0, samples[-1].t),
    )
    memory.legend(frameon=False, markerscale=4)
    for event in events:
        loss.axvline(event["step"], color="0.6", linewidth=0.8)
        top = (event["step"], loss.get_ylim()[1])
        loss.annotate(event["what"].split(",")[0], top, fontsize=8, va="bottom", ha="center")
        for axes in (rate, memory):
            axes.axvline(event["t"], color="0.6", linewidth=0.8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
