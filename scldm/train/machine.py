"""Use of processor, memory, disk and GPUs of each node of a run, in rows of its folder.

    system.jsonl         of the first rank's node
    system/NODE.jsonl    of every other node, written by the first rank there

Followers read these files, so the first rank alone talks to MLflow. A row's split is `system`. In a run on several
nodes it is `system/NODE`, as MLflow names the metrics of nodes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scldm.train.follower import SYSTEM, SYSTEM_OF, append_row, say

FIRST_S = 1.0  # use of a processor is a mean over time, so none is known at once
NODES_AT_ONCE = 10  # that give a row each `tracking.system_s`. 8 GPUs make 46 numbers of a row


class Place(NamedTuple):
    """Where a rank runs.

    node: name of its node, empty in a run on one
    n_nodes: of the run
    samples: whether it is the first rank there, which takes the node's samples
    """

    node: str = ""
    n_nodes: int = 1
    samples: bool = True

    def every_s(self, system_s: float) -> float:
        """Seconds between two samples of a node. On more than NODES_AT_ONCE nodes they are rarer, so that the number
        of rows of the run stays the same."""
        return system_s * max(1.0, self.n_nodes / NODES_AT_ONCE)


def place_of(hosts: Sequence[str], rank: int) -> Place:
    """The place of a rank. hosts: the name of each rank's host, by rank"""
    n_nodes = len(set(hosts))
    return Place(hosts[rank] if n_nodes > 1 else "", n_nodes, hosts.index(hosts[rank]) == rank)


def place_from_environment() -> Place:
    """The place of a process that need not meet the others, as torchrun or srun tell it. Alone under neither, and where
    what they tell is no number."""
    of = os.environ

    def number(name: str) -> int:
        return int(of[name]) if of.get(name, "").isdecimal() else 0

    n_nodes = max(1, number("SLURM_STEP_NUM_NODES"))
    if local := number("LOCAL_WORLD_SIZE"):
        n_nodes = max(1, -(-number("WORLD_SIZE") // local))
    first = (of.get("LOCAL_RANK") or of.get("SLURM_LOCALID") or "0") == "0"
    return Place(socket.gethostname() if n_nodes > 1 else "", n_nodes, first)


class Sampler(threading.Thread):
    """Appends a sample of this node to a file every so often. Nothing waits for it, and its failure is a line.

    step: that the rows are noted at
    """

    def __init__(self, run_dir: Path, place: Place, system_s: float, is_first: bool) -> None:
        super().__init__(name="system metrics", daemon=True)
        self.path = run_dir / (SYSTEM if is_first else f"{SYSTEM_OF}/{place.node}.jsonl")
        self.split = f"system/{place.node}" if place.node else "system"
        self.every_s, self.step, self.closing = place.every_s(system_s), 0, threading.Event()

    def run(self) -> None:
        machine, warned, wait_s = Machine(), False, min(FIRST_S, self.every_s)
        if machine.psutil is None and not machine.gpus:
            say("the machine is not sampled: that needs `pip install psutil`")
            return
        while not self.closing.wait(wait_s):
            wait_s = self.every_s
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab", buffering=0) as file:
                    append_row(file, self.step, {}, machine.sample(), self.split)
            except Exception as error:  # a figure of the machine is worth no run
                if not warned:
                    warned = True
                    say(f"{self.path} lacks samples of the machine ({error}). Training goes on without them")

    def close(self) -> None:
        self.closing.set()
        self.join(1.0)  # a row that is being written. A file system that hangs is not waited for


class Machine:
    """This node's use of processor, memory, disk and GPUs, by the names of MLflow's own monitors.

    Importing those would take MLflow to every node. What can't be measured here is left out.
    """

    def __init__(self) -> None:
        self.psutil: Any = None
        self.nvml: Any = None
        self.gpus: list[Any] = []
        with contextlib.suppress(ImportError):
            import psutil

            psutil.cpu_percent()  # the next call measures from here on
            self.psutil = psutil
        try:
            import pynvml  # pyright: ignore[reportMissingImports]

            pynvml.nvmlInit()
            self.gpus = [pynvml.nvmlDeviceGetHandleByIndex(k) for k in range(pynvml.nvmlDeviceGetCount())]
            self.nvml = pynvml
        except ImportError:
            if Path("/proc/driver/nvidia").is_dir():
                say("use and power of GPUs are not sampled: that needs `pip install nvidia-ml-py`")
        except Exception:  # no driver, or one that answers nothing
            pass

    def sample(self) -> dict[str, float]:
        out: dict[str, float] = {}
        if self.psutil is not None:
            memory, disk = self.psutil.virtual_memory(), self.psutil.disk_usage(os.sep)
            out = {
                "cpu_utilization_percentage": self.psutil.cpu_percent(),
                "system_memory_usage_megabytes": memory.used / 1e6,
                "system_memory_usage_percentage": 100 * memory.used / memory.total,
                "disk_usage_percentage": disk.percent,
                "disk_usage_megabytes": disk.used / 1e6,
                "disk_available_megabytes": disk.free / 1e6,
            }
        for k, gpu in enumerate(self.gpus):
            out |= {f"gpu_{k}_{name}": value for name, value in self._of_gpu(gpu).items()}
        return {name: round(value, 1) for name, value in out.items()}

    def _of_gpu(self, gpu: Any) -> dict[str, float]:
        """Of one GPU, what its driver tells: some tell no power."""
        out: dict[str, float] = {}
        with contextlib.suppress(self.nvml.NVMLError):
            memory = self.nvml.nvmlDeviceGetMemoryInfo(gpu)
            out["memory_usage_percentage"] = 100 * memory.used / memory.total
            out["memory_usage_megabytes"] = memory.used / 1e6
        with contextlib.suppress(self.nvml.NVMLError):
            out["utilization_percentage"] = self.nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
        with contextlib.suppress(self.nvml.NVMLError):
            out["power_usage_watts"] = self.nvml.nvmlDeviceGetPowerUsage(gpu) / 1_000
            limit = self.nvml.nvmlDeviceGetEnforcedPowerLimit(gpu)
            out["power_usage_percentage"] = 100_000 * out["power_usage_watts"] / limit
        return out
