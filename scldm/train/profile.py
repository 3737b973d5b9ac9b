"""A profile on demand: `touch RUN/profile`, and the first rank notes where its next steps spend their time.

    RUN/profiles/step-N/trace.json.gz    every operation, for chrome://tracing or ui.perfetto.dev
    RUN/profiles/step-N/parts.txt        the parts of a step, and the operations that took most

The parts are what the loop tells the watch over hangs: it marks each as it begins. On a GPU they are NVTX ranges too.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from scldm.files import made_aside, outlived
from scldm.parallel.dist import World
from scldm.train.requests import PROFILE_FILE
from scldm.train.tracking import Tracker

FOLDER = "profiles"
STEPS = 5
LAST, VALIDATES = "agrees on requests", "validates"  # the last part of a step, and what may follow it
ROWS = 30  # operations in the table


class StepProfile:
    """Of the first rank alone, for STEPS steps or until it validates. Without a request it does nothing, and no failure
    of it ends a run."""

    def __init__(self, run_dir: Path, world: World, tracker: Tracker) -> None:
        self.run_dir, self.tracker, self.on_gpu = run_dir, tracker, world.device.type == "cuda"
        self._profiler: Any = None
        self._range: Any = None
        self._first, self._n_steps, self._parts = 0, 0, dict[str, None]()

    def step(self, step: int, wanted: bool) -> None:
        """A step begins: what was asked for begins with it, and ends after STEPS of them."""
        if self._profiler is not None:
            if self._n_steps == STEPS:
                self.close()
        elif wanted and self._taken():
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
            try:
                profiler = profile(activities=activities)
                profiler.start()
            except Exception as error:  # such as another profiler that holds the GPU's counters
                print(f"scldm: no profile: {error}", file=sys.stderr, flush=True)
                return
            self._profiler, self._first, self._n_steps, self._parts = profiler, step, 0, {}

    def mark(self, doing: str) -> None:
        """A part of the step begins, and the one before it ends."""
        if self._profiler is None:
            return
        self._end_part()
        part = part_of(doing)
        if part == VALIDATES:  # as long as many steps, and more to write than a rank may have memory for
            return self.close()
        self._n_steps += part == LAST
        self._parts[part] = None
        self._range = record_function(part)
        self._range.__enter__()
        if self.on_gpu:
            torch.cuda.nvtx.range_push(part)

    def close(self, written: bool = True) -> None:
        """End a profile that was begun, and write it or drop it."""
        if self._profiler is None:
            return
        self._end_part()
        profiler, self._profiler = self._profiler, None
        try:
            profiler.stop()
            if written:
                self._write(profiler, max(self._n_steps, 1))
        except Exception as error:
            print(f"scldm: the profile failed: {error}", file=sys.stderr, flush=True)

    def _write(self, profiler: profile, n_steps: int) -> None:
        folder = self.run_dir / FOLDER / f"step-{self._first:08d}"
        with outlived(folder):
            with made_aside(folder) as part:
                part.mkdir()
                profiler.export_chrome_trace(str(part / "trace.json.gz"))
                (part / "parts.txt").write_text(table(profiler, list(self._parts), n_steps))
            for file in sorted(folder.iterdir()):
                self.tracker.log_artifact(file, f"{FOLDER}/{folder.name}")
            print(f"scldm: profile of {n_steps} steps: {folder}", file=sys.stderr, flush=True)

    def _end_part(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
            if self.on_gpu:
                torch.cuda.nvtx.range_pop()

    def _taken(self) -> bool:
        """Take the request away, so that it asks once."""
        file = self.run_dir / PROFILE_FILE
        with outlived(file), suppress(FileNotFoundError):
            file.unlink()
            return True
        return False


def part_of(doing: str) -> str:
    """What is done, without the numbers of step and batch: `computes micro-batch 0 of step 7` computes micro-batch."""
    return re.sub(r"( of| in| after)?( step| validation batch| batch)? \d+", "", doing)


def table(profiler: profile, parts: list[str], n_steps: int) -> str:
    """Milliseconds a step and share of each part on the CPU, and from its first to its last work on the GPU. Then the
    operations follow. Of what autograd's own thread has the GPU do, the part may know nothing: the trace shows that."""
    averages = profiler.key_averages()
    cpu, gpu = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0.0)
    for event in averages:  # with a GPU, a part has a row of each device
        if event.key in cpu and event.device_type == DeviceType.CPU:
            cpu[event.key] += event.cpu_time_total
        elif event.key in gpu:
            gpu[event.key] += event.device_time_total
    total = sum(cpu.values()) or 1
    lines = [f"{'part':<40}{'ms a step':>12}{'share':>8}{'GPU, ms':>12}"]
    for part in parts:
        share = f"{cpu[part] / total:>8.1%}"
        lines.append(f"{part:<40}{cpu[part] / 1e3 / n_steps:>12.2f}{share}{gpu[part] / 1e3 / n_steps:>12.2f}")
    return "\n".join(lines) + "\n\n" + averages.table(sort_by="self_cpu_time_total", row_limit=ROWS)
