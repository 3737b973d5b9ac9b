"""What following a run takes of its CPU time: rows, sending them to MLflow, samples of the machine.

Noise between two runs is larger than what is looked for. So the CPU time of the threads that follow one run is
measured, and that of the calls that write rows, against all the rest of the process.
Reading order: BenchTrackingConfig, main, slowness, Followed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.report import Report, Row, run_benchmark
from benchmarks.train import SameCells, Work, bare, preset_work
from launch.config import compose
from launch.train_vae import TrainVAEConfig
from scldm.parallel.dist import World
from scldm.parallel.engine import HardwareConfig, start_engine
from scldm.train.loop import TrainConfig, train
from scldm.train.optim import make_optimizer
from scldm.train.tracked import unsent
from scldm.train.tracking import Tracker, TrackingConfig

PURPOSE = """Measure the share of a training's CPU time that tracking takes, after its start, and what the start takes.
Tracking sends by the clock. Where others take the processor, the clock's periods are stretched by as much. So as many
steps lie between two of them as on a machine of its own. Previews are apart, see `train.preview_share`."""
EXAMPLE = """
python -m benchmarks.tracking save=benchmarks/tracking-cpu.json
"""


@dataclass(frozen=True)
class BenchTrackingConfig:
    """What to measure.

    preset: of training an autoencoder
    n_genes: that every cell has
    steps: of the preset's batch
    uri: of MLflow; empty means a database of its own
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    preset: str = "vae/tiny"
    n_genes: int = 765
    steps: int = 600
    uri: str = ""
    json: bool = False
    save: str = ""


CONFIG = BenchTrackingConfig


def main(config: BenchTrackingConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = ["run_dir=none", "data.shards=none", "hardware/cpu"]
    preset: Any = compose(TrainVAEConfig, [config.preset, *given])
    work, world = preset_work([config.preset, "hardware/cpu"], config.n_genes), World(0, 1, torch.device("cpu"))
    n_cells, optim, stage = work.batch.n_cells, work.optim, work.stage()
    cells = SameCells(work.batch, config.steps, world.device)
    hardware = HardwareConfig(engine="plain", micro_batch=n_cells)
    engine = start_engine(stage.module, lambda m: make_optimizer(optim, m), hardware, optim.clip, world, n_cells)
    of = {"log_every": preset.train.log_every, "validate_every": config.steps, "save_every": config.steps}
    course = TrainConfig(config.steps, n_cells, **of)
    slow = slowness(work, world)
    cfg = TrackingConfig(uri=config.uri, close_s=60)
    cfg = replace(cfg, every_s=slow * cfg.every_s, system_s=slow * cfg.system_s)
    with tempfile.TemporaryDirectory() as own, redirect_stderr(StringIO()):
        before = time.process_time()
        tracker = Followed(Path(own), cfg, stage="bench")
        with tracker:
            tracker.log(0, {"loss": 0.0})
            while not (Path(own) / "mlflow_run.json").is_file() or unsent(Path(own)):
                time.sleep(0.2)
            start, begin, followed = time.process_time() - before, time.process_time(), tracker.cpu_s()
            clock = time.monotonic()
            train(stage, engine, cells, cells, course, optim, world, Path(own), tracker, "bench")
            followed, whole = tracker.cpu_s() - followed, time.process_time() - begin
            clock = time.monotonic() - clock
    report = Report(
        "tracking", {"preset": config.preset, "genes": config.n_genes, "steps": config.steps}, save=config.save
    )
    report.add(Row("training", whole - followed, "s of CPU time"))
    report.add(Row("training", clock, "s of the clock"))
    report.add(Row.at_most("tracking / training", followed / (whole - followed), "of CPU times", 0.01))
    report.add(Row("a second of CPU time took", slow, "s of the clock"))
    report.add(Row("tracking's start, once a run", start, "s of CPU time"))
    report.print(config.json)
    return report


def slowness(work: Work, world: World) -> float:
    """Seconds of the clock that a second of CPU time takes here, 1 on a machine of its own."""
    clock, used = time.monotonic(), time.process_time()
    bare(work, "fp32", 50, world.device)
    return max(1.0, (time.monotonic() - clock) / (time.process_time() - used))


class Followed(Tracker):
    """A tracker that knows its CPU time."""

    logged_s = 0.0

    def log(self, *values: Any, **more: Any) -> None:
        start = time.thread_time()
        super().log(*values, **more)
        self.logged_s += time.thread_time() - start

    def cpu_s(self) -> float:
        """Seconds of CPU time of its threads so far, and of what wrote rows."""
        own = {thread.native_id for thread in (self._forwarder, self._sampler) if thread is not None}
        return self.logged_s + sum(of.user_time + of.system_time for of in psutil.Process().threads() if of.id in own)


if __name__ == "__main__":
    sys.exit(run_benchmark("tracking"))
