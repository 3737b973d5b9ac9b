"""What every benchmark prints: a table for a person, and with --json the same rows for a machine.

Reading order: Row, Report, device_name, commit, run_benchmark.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from launch import cli
from scldm.files import write_json


@dataclass(frozen=True)
class Row:
    """One measured number; `target` as a person reads it, such as `<= 1.5`; `met` is None where there is no target.
    A value of None was not measured, for a reason that the name gives."""

    name: str
    value: float | None
    unit: str
    target: str = ""
    met: bool | None = None

    @classmethod
    def at_most(cls, name: str, value: float, unit: str, target: float) -> Row:
        return cls(name, value, unit, f"<= {target:g}", value <= target)

    @classmethod
    def at_least(cls, name: str, value: float, unit: str, target: float) -> Row:
        return cls(name, value, unit, f">= {target:g}", value >= target)

    @classmethod
    def not_measured(cls, name: str, why: str, unit: str, target: str = "") -> Row:
        return cls(f"{name}: {why}", None, unit, target)


@dataclass
class Report:
    """Rows of one benchmark, with what it takes to run it again.

    benchmark: its module in this package, such as `shards`
    settings: what was measured on: cells, genes, repeats
    command: the command line; without the folder of `h5ad=`, which says nothing on another machine
    save: JSON file that every row is written to as it comes, so that a benchmark that is ended leaves what it found;
        empty writes none
    """

    benchmark: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    command: str = ""
    save: str = ""
    finished: bool = False

    def __post_init__(self) -> None:
        words = [f"h5ad={Path(word).name}" if word.startswith("h5ad=") else word for word in sys.argv[1:]]
        self.command = self.command or shlex.join(["python", "-m", f"benchmarks.{self.benchmark}", *words])

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    @property
    def met(self) -> bool:
        """Whether no row misses its target."""
        return all(row.met is not False for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "command": self.command,
            "commit": commit(),
            "device": device_name(),
            "settings": self.settings,
            **({} if self.finished else {"unfinished": True}),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def table(self) -> str:
        """The rows as aligned text, under a line that says where and on what."""
        cells = [["", "value", "unit", "target", ""]]
        marks = {None: "", True: "met", False: "MISSED"}
        cells += [
            [r.name, "n/a" if r.value is None else f"{r.value:,.4g}", r.unit, r.target, marks[r.met]] for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells)]
        head = (
            f"{self.benchmark}: {', '.join(f'{k} {v}' for k, v in self.settings.items())}; {device_name()}; {commit()}"
        )
        lines = [
            f"{name:<{widths[0]}}  {value:>{widths[1]}}  {unit:<{widths[2]}}  {target:<{widths[3]}}  {mark}".rstrip()
            for name, value, unit, target, mark in cells
        ]
        return "\n".join([head, *lines])

    def print(self, as_json: bool) -> None:
        """The table, or with as_json the JSON, to stdout."""
        self.finished = True
        self.write()
        print(json.dumps(self.to_json(), indent=1) if as_json else self.table())

    def write(self) -> None:
        """The JSON to the file, whole or not at all."""
        if self.save:
            Path(self.save).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(self.save), self.to_json())


def device_name() -> str:
    """The GPU's name where torch is loaded and sees one, else the processor's, with the number of usable cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


@cache  # git runs once, before the first row: the file of rows may be one of the checkout
def commit() -> str:
    """The commit of the checkout that runs, `+` where files differ from it; `unknown` outside one."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def median(values: Sequence[float]) -> float:
    """Of repeats: one slow run on a shared machine must not decide."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def run_benchmark(name: str) -> int:
    """`python -m benchmarks.NAME` runs as a verb does: help, keys, refusals. Returns the exit code."""
    return cli.run(f"python -m benchmarks.{name}", f"benchmarks.{name}", sys.argv[1:])
