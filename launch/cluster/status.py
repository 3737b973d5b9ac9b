"""`scldm status RUN`: how far a run is, by the files in its folder and what Slurm says of its job."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from launch.cluster.notes import BAD_NODES, State, find_notes, nodes_in, state_of, with_run
from launch.config import compose
from launch.evaluation.gate import line_of
from scldm.errors import InputError
from scldm.given_json import LARGEST, Count, known_of
from scldm.parallel import START_S
from scldm.train import changes
from scldm.train.run_folder import is_trained, outcome_of, read_config, started_at, trained_on
from scldm.train.steps import pointed
from scldm.train.tracking import read_metrics

PURPOSE = """How far a run is: its job's state, step, cells/s, time left, last checkpoint, last error of each rank.
Of a pipeline's folder, the state of every job."""
EXAMPLE = """
scldm status runs/vae
"""


@dataclass(frozen=True)
class StatusConfig:
    """What to look at.

    run: run folder, pipeline folder, or what a submitted verb makes. Given as the first word
    """

    run: str


CONFIG = StatusConfig
USAGE = "scldm status RUN"


def read(words: Sequence[str]) -> StatusConfig:
    """The first word is the folder."""
    return compose(StatusConfig, with_run(words))


def main(config: StatusConfig) -> None:
    run = Path(config.run)
    try:
        notes = find_notes(run)
    except InputError:
        if not (run / "config.json").is_file():
            raise
        notes = []  # a run that torchrun started
    if len(notes) > 1 or (run / "slurm" / "chain.json").is_file():
        print(table([(folder.name, state_of(folder)) for folder in notes]))
        return
    lines: list[tuple[str, str]] = []
    if notes:
        state = state_of(notes[0])
        lines.append(("state", f"{state.state}, job {state.job}{': ' if state.reason else ''}{state.reason}"))
        lines += unfit(notes[0])
    else:
        lines.append(("state", state_of_run(run)))
    if (run / "config.json").is_file():
        lines += training(run, with_outcome=bool(notes))
    print("\n".join(f"{name:<12}{text}" for name, text in lines))


def table(states: Sequence[tuple[str, State]]) -> str:
    """A line for every job of a chain. What comes after a failed one will not run."""
    lines, failed = [], ""
    for name, state in states:
        text = f"{state.state:<12}job {state.job:<8}{state.reason}" if state.job else state.state
        if failed and state.job and state.state in ("PENDING", "CANCELLED", "LOST"):
            text = f"{'NOT RUN':<12}job {state.job:<8}it depends on {failed}"
        elif state.state not in ("DONE", "PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING"):
            failed = f"{name}, which ended as {state.state}"
        lines.append(f"{name:<16}{text}".rstrip())
    return "\n".join(lines)


def unfit(notes: Path) -> list[tuple[str, str]]:
    return [("bad node", f"{node}: {why} ({when})") for node, (when, why) in nodes_in(notes / BAD_NODES).items()]


def state_of_run(run: Path) -> str:
    """Of a run that no job trains, by its files and its lock."""
    outcome = outcome_of(run)
    if is_trained(run):
        return "RUNNING"
    if outcome and outcome.state != "running":
        code = f", exit code {outcome.exit_code}" if outcome.exit_code else ""
        return f"{outcome.state.upper()}{code}{': ' if outcome.reason else ''}{outcome.reason}"
    files = [path for name in ("", "checkpoints") for path in (run / name).glob("*") if path.is_file()]
    silent_s = time.time() - max(path.stat().st_mtime for path in files)
    last, host = ago(silent_s), trained_on(run)
    hang_s = training_config(run)["train"].get("hang_s") or math.inf
    if host not in ("", socket.gethostname()) and silent_s < hang_s + START_S:
        return f"RUNNING or killed: it is trained on {host}, whose locks this host may not see. It last wrote {last}"
    return f"KILLED: no process trains in it, and the last one left no word of its end. It last wrote {last}"


def seconds_per_step(rows: Sequence[Mapping[str, Any]], since: float) -> float | None:
    """What a step takes in all, validation and saving included: by when rows of training were written, from the first
    one after `since`, when the process started. None where there are no two."""
    rows = [row for row in rows if row["time"] >= since]
    n_steps = rows[-1]["step"] - rows[0]["step"] if rows else 0
    return (rows[-1]["time"] - rows[0]["time"]) / n_steps if n_steps > 0 else None


def training_config(run: Path) -> Any:
    """Raises: InputError for a folder that is no training run's."""
    config = read_config(run)
    if "train" not in config:
        raise InputError(f"{run} is not the folder of a training run: its config.json has no train.steps")
    known = known_of(_Train, config["train"], f"{run}/config.json: train")
    return {**config, "train": {**asdict(known), **config["train"]}}


@dataclass(frozen=True)
class _Train:
    steps: Annotated[int, range(1, LARGEST)]
    global_batch: Count = 1
    hang_s: float = 0.0


def training(run: Path, with_outcome: bool) -> list[tuple[str, str]]:
    """What a training run's own files say, and of errors those since its last start."""
    config = training_config(run)
    steps, lines = config["train"]["steps"], []
    rows = read_metrics(run, "train")
    if rows:
        last = rows[-1]
        step, speed = last["step"], last["cells_per_s"]
        step_s = seconds_per_step(rows, started_at(run)) or config["train"]["global_batch"] / speed
        lines.append(("step", f"{step:,} of {steps:,} ({100 * step / steps:.1f} %), loss {last['loss']:.4g}"))
        lines.append(("cells/s", f"{speed:,.0f}, {ago(time.time() - last['time'])}"))
        lines.append(("time left", duration((steps - step) * step_s)))
        told = {"waiting_share": "waits {:.1%} of the time", "mfu": "{:.1%} of peak FLOP/s", "memory_gb": "{:.1f} GB"}
        said = [form.format(last[key]) for key, form in told.items() if last.get(key) is not None]
        lines += [("a rank", ", ".join(said))] if said else []
    if with_outcome and (outcome := outcome_of(run)) and outcome.reason:
        lines.append(("outcome", f"{outcome.state}: {outcome.reason}"))
    pointer = run / "checkpoints" / "latest"
    if target := pointed(pointer):
        written = ago(time.time() - pointer.stat().st_mtime)
        lines.append(("checkpoint", f"step {int(target.name.removeprefix('step-')):,}, {written}"))
    lines += [("changed", changes.told(entry)) for entry in changes.read(run)]
    if found := line_of(run):
        lines.append(("autoencoder", found))
    for path in sorted((run / "errors").glob("rank-*.txt"), key=lambda p: (len(p.stem), p.stem)):
        told = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        if told and path.stat().st_mtime >= started_at(run):
            lines.append((path.stem, f"{told[-1].strip()} ({ago(time.time() - path.stat().st_mtime)})"))
    return lines


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, minutes = divmod(minutes, 24 * 60)
    hours, minutes = divmod(minutes, 60)
    return " ".join(f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if n)


def ago(seconds: float) -> str:
    return f"{duration(max(seconds, 0.0))} ago"
