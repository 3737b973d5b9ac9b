"""Time and peak memory of a piece of work on whatever device there is.

Reading order: Cost, failure_of, measure, measure_in_turn, seconds_of, peak_of.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import median


@dataclass(frozen=True)
class Cost:
    """seconds: of CPU time, all threads, or of a GPU; peak_bytes: the most memory beyond what there was before."""

    seconds: float
    peak_bytes: int


def failure_of(work: Callable[[], object], device: torch.device) -> str:
    """Why a piece of work can't run on this GPU; empty where it ran. One way that takes too much memory, or whose
    kernel does not compile there, ends no benchmark of others. On a CPU it raises: there it is a bug of ours."""
    try:
        work()
    except Exception as error:
        if device.type != "cuda":
            raise
        traceback.print_exc()
        why = str(error).strip().splitlines() or [""]
        failed = f"failed: {type(error).__name__}: {why[0][:200]}"
    else:
        return ""
    gc.collect()  # beyond the block, as its error holds the work's tensors
    torch.cuda.empty_cache()
    return failed


def measure(work: Callable[[], object], repeats: int, device: torch.device) -> Cost:
    """The median of the repeats' time, after one call that is not timed and gives the peak."""
    return measure_in_turn({"": work}, repeats, device)[""]


def measure_in_turn(works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Cost]:
    """`measure` of several, one after another in every round, so that what else the machine does meets all of them."""
    peaks = {name: peak_of(work, device) for name, work in works.items()}
    rounds = [{name: seconds_of(work, device) for name, work in works.items()} for _ in range(repeats)]
    return {name: Cost(median([found[name] for found in rounds]), peak) for name, peak in peaks.items()}


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    began = time.process_time()
    work()
    return time.process_time() - began


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of the most memory beyond what there was before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        work()
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    before = _status_kb("VmRSS")
    work()
    return (_status_kb("VmHWM") - before) * 1024


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
