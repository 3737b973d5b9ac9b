"""How fast cells pass and what they cost: the metrics of training between two rows of the log."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from scldm.files import outlived
from scldm.parallel.dist import World

# dense TFLOP/s of matrix products, without sparsity. fp32 is not TF32's, which only bf16 has beside it.
# Source: NVIDIA's data sheets of A100, H100 SXM, H200 SXM, B200 (DGX B200: 8 GPUs), L4, L40S
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "A100": {"fp32": 19.5, "bf16": 312.0},
    "H100": {"fp32": 67.0, "bf16": 989.5},
    "H200": {"fp32": 67.0, "bf16": 989.5},
    "B200": {"fp32": 75.0, "bf16": 2_250.0},
    "L40S": {"fp32": 91.6, "bf16": 362.0},
    "L4": {"fp32": 30.3, "bf16": 121.0},
    "CPU": {"fp32": 0.17, "bf16": 0.17},  # of a core, measured: large matrix product in benchmarks/mcab-cpu.json
}

# TB/s of a GPU's memory. Source: the same data sheets
MEMORY_TB_S: dict[str, float] = {
    "A100": 2.039,
    "H100": 3.35,
    "H200": 4.8,
    "B200": 8.0,
    "L40S": 0.864,
    "L4": 0.3,
    "CPU": 0.01,
}


def peak_flops(device: torch.device, precision: str, stated_tflops: float = 0.0) -> float:
    """FLOP/s of a device at a precision, as stated or by its name. 0 for one that the table lacks, as a CPU."""
    if stated_tflops:
        return 1e12 * stated_tflops
    if device.type != "cuda":
        return 0.0
    peaks = PEAK_TFLOPS.get(gpu_name(device))
    return 1e12 * peaks[precision] if peaks else 0.0


def gpu_name(device: torch.device) -> str:
    """As PEAK_TFLOPS has it. One that the table lacks is called as it calls itself."""
    name = torch.cuda.get_device_name(device)
    return next((kind for kind in PEAK_TFLOPS if kind in name.replace("-", " ").split()), name)


class Meter:
    """Means of training metrics between two readings, over all ranks, and how fast cells passed.

    flops_per_cell: of the path that is run, forward and backward. 0 where it is not known
    peak: FLOP/s of a rank's device. 0 where it is not known
    """

    def __init__(self, world: World, flops_per_cell: float = 0.0, peak: float = 0.0) -> None:
        self.world, self.flops_per_cell, self.peak = world, flops_per_cell, peak
        self._settled: dict[str, float] = {}  # sums over all ranks of the steps before the last checkpoint
        self.n_steps = 0  # since the last reading, also by a process that this one resumed
        self._restart()

    def _restart(self) -> None:
        self._unsettled: list[dict[str, torch.Tensor]] = []  # sums over this rank's cells, a step each
        self._cells, self._n_timed = torch.zeros((), device=self.world.device), 0
        self._waited_s, self._paused_s, self._start = 0.0, 0.0, time.perf_counter()

    def wait_for(self, loader: Any) -> list[Any]:
        began = time.perf_counter()
        batches = next(loader)
        self._waited_s += time.perf_counter() - began
        return batches

    def add(self, losses: list[dict[str, torch.Tensor]]) -> None:
        """The loss, its parts and the cells of each micro-batch of a step, on this rank's device."""
        sums: dict[str, torch.Tensor] = {}
        for parts in losses:
            for key, value in parts.items():
                sums[key] = sums.get(key, 0) + value
        self._unsettled.append(sums)
        self._cells += sums["cells"]
        self.n_steps, self._n_timed = self.n_steps + 1, self._n_timed + 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What passes within is no training: its time does not count."""
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the row that was begun. Collective."""
        self._settle()
        return {"n_steps": self.n_steps, "sums": dict(self._settled)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.n_steps, self._settled = state["n_steps"], dict(state["sums"])

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """(row of all ranks, row of this rank). Collective.

        cells_per_s: of all ranks. cells_per_s_rank: of one, on average. mfu: share of the peak, where both are known
        waiting_share: of the time in which the loader was waited for
        memory_gb: the most that a rank had at once since the start, on the device or, for a CPU, resident
        """
        elapsed = time.perf_counter() - self._start - self._paused_s
        own = {"cells": float(self._cells), "waited_s": self._waited_s}
        timed = self.world.sum(own)
        memory = _memory_bytes(self.world.device)
        (most,) = self.world.begin_max([memory])()
        self._settle()
        size, n_cells = self.world.size, self._settled.pop("cells")
        row = {
            **{key: value / n_cells for key, value in self._settled.items()},
            "cells_per_s": timed["cells"] / elapsed,
            "cells_per_s_rank": timed["cells"] / elapsed / size,
            "step_s": elapsed / max(self._n_timed, 1),
            "waiting_share": timed["waited_s"] / size / elapsed,
            "memory_gb": most / 1e9,
        }
        if self.flops_per_cell and self.peak:
            row["mfu"] = timed["cells"] / elapsed / size * self.flops_per_cell / self.peak
        mine = {"cells_per_s": own["cells"] / elapsed, "waiting_share": own["waited_s"] / elapsed}
        self._settled, self.n_steps = {}, 0
        self._restart()
        return row, {**mine, "memory_gb": memory / 1e9}

    def _settle(self) -> None:
        """Add the steps up over the ranks, one after the other, so that the sum is the same wherever this is done."""
        if self._unsettled:
            names = [(k, key) for k, sums in enumerate(self._unsettled) for key in sums]
            values = torch.stack([self._unsettled[k][key].double() for k, key in names]).tolist()
            totals = self.world.sum({f"{k} {key}": value for (k, key), value in zip(names, values, strict=True)})
            for k, key in names:
                self._settled[key] = self._settled.get(key, 0.0) + totals[f"{k} {key}"]
            self._unsettled = []


def note_rank(run_dir: Path, rank: int, step: int, own: dict[str, float]) -> None:
    """A line of a rank's own numbers, in its own file."""
    path = run_dir / "ranks" / f"{rank}.jsonl"
    with outlived(path):
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"step": step, **own}) + "\n")


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
