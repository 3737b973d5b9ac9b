"""Two ranks that meet a fault: what each of them runs, in a process of its own.

Reading order: Fault, Ranks, the rest.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from data_pipeline.stream.loader import StreamConfig
from launch.training import Parts, RunConfig, run_training
from scldm.errors import InputError
from scldm.parallel.dist import World, close_world, world_of_environment
from scldm.parallel.engine import HardwareConfig
from scldm.train.loop import TrainConfig
from scldm.train.losses import GuidanceConfig, LDMStage, VAEStage
from scldm.train.optim import OptimConfig
from scldm.train.previews import Check, Make, Preview
from scldm.train.requests import LOOK_EVERY_S
from scldm.train.tracking import TrackingConfig
from scldm.vocab import ConditionVocab, GeneVocab
from tests.scldm.train.small_runs import N_GENES, CellsLoader, LatentsLoader, make_cells, make_dit, make_vae, small_run

STEPS, GLOBAL_BATCH = 16, 16
GRACE_S = 20  # in which a rank is to end after another did
OPTIM = OptimConfig(lr=3e-3, clip=2.0, weight_decay=0.01)
EVERY = {"steps": STEPS, "ema_decay": 0.9, "log_every": 1, "validate_every": 8, "save_every": 5}


@dataclass(frozen=True)
class Fault:
    """kind: a name of `meet`; rank, steps: where it is met, when the cells of the step are asked for; or, validating,
    when the first validation batch after one of the steps is computed"""

    kind: str = ""
    rank: int = 1
    steps: tuple[int, ...] = (9,)
    validating: bool = False


@dataclass(frozen=True)
class SmallConfig(RunConfig):
    """stage: vae or ldm; the rest as the verbs have it"""

    data: StreamConfig = field(default_factory=lambda: StreamConfig(shards=""))
    optim: OptimConfig = OPTIM
    train: TrainConfig = field(default_factory=lambda: TrainConfig(global_batch=GLOBAL_BATCH, **EVERY))  # pyright: ignore[reportArgumentType]
    hardware: HardwareConfig = field(default_factory=lambda: HardwareConfig("deepspeed", micro_batch=4))
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(enabled=False))
    stage: str = "vae"

    def __post_init__(self) -> None:
        """Takes what verbs refuse, such as a wait shorter than a hang."""


class Ranks:
    """Starts processes from one that has imported everything: a start takes a second, not ten."""

    def __init__(self, folder: Path) -> None:
        root = str(Path(__file__).resolve().parents[2])  # its processes are to find this module
        os.environ |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        self.folder, self.n = folder, 0
        self.context = multiprocessing.get_context("forkserver")
        # what DeepSpeed and AdamW import at their first use is most of a start: 28 s of 30 on a busy machine
        late = ["torch._dynamo", "torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.original_muon"]
        self.context.set_forkserver_preload(["deepspeed", *late, __name__])

    def run(self, work: Any, *arguments: Any, size: int = 2, timeout: float = 60) -> tuple[list[int | None], list[str]]:
        """Exit code and output of every rank of work(*arguments); those that do not end in time are killed: None."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.n += 1
        outputs = [self.folder / f"output-{self.n}-{rank}.txt" for rank in range(size)]
        processes = [
            self.context.Process(target=_rank, args=(rank, size, port, str(outputs[rank]), work, arguments))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        codes: list[int | None] = []
        ended, end = False, time.monotonic() + timeout
        while any(process.exitcode is None for process in processes) and time.monotonic() < end:
            if not ended and any(process.exitcode is not None for process in processes):
                ended, end = True, min(end, time.monotonic() + GRACE_S)
            multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], 0.1)
        # a rank that is stopped, as by SIGSTOP, is ended by the launcher that sees the others end
        for process in processes:
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
                process.join()
        return codes, [path.read_text() for path in outputs]


def _rank(rank: int, size: int, port: int, output: str, work: Any, arguments: tuple) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except InputError as error:  # as launch.cli
        print(f"error: {error}")
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def train(
    config: SmallConfig,
    *faults: Fault,
    judge: Callable[[Any, Any], None] | None = None,
    preview: Callable[[torch.nn.Module], Make] | None = None,
) -> None:
    """The run of a config, as the verbs start it, with faults, and with previews on the first rank."""

    def set_up(world: World) -> Parts:
        stage = VAEStage(make_vae()) if config.stage == "vae" else LDMStage(make_dit(), GuidanceConfig(0.2))
        kind, n_given = (CellsLoader, 24) if config.stage == "vae" else (LatentsLoader, 0)
        place = (config.train.global_batch, config.hardware.micro_batch, world.rank, world.size)
        loader = kind(make_cells(50, 0), *place, n_given=n_given)
        for fault in faults:
            if fault.rank == world.rank:
                plant(fault, stage, loader, Path(config.run_dir))
        genes = GeneVocab(tuple(f"g{k}" for k in range(N_GENES)), "symbol")
        manifest: Any = SimpleNamespace(
            genes=genes,
            conditions=ConditionVocab({}),
            statistics=SimpleNamespace(library_sizes=()),
            query={},
            kind="cells",
        )
        made = preview(stage.module) if preview and world.is_first else None
        return Parts(stage.module, stage, loader, kind(make_cells(21, 1), *place), manifest, preview=made)

    run_training(f"train {config.stage}", config, set_up, judge)


def train_with_previews(config: SmallConfig) -> None:
    """Each preview says whether the first rank has the whole network, and the same on every validation."""

    def preview(module: torch.nn.Module) -> Make:
        def make(step: int, check: Check) -> Preview:
            numbers = torch.cat([p.detach().flatten() for p in module.parameters()])
            print(f"preview of step {step}: {len(numbers)} numbers, {torch.rand(3)}")
            return Preview({"norm": float(numbers.norm())}, b"")

        return make

    train(config, preview=preview)


def train_and_judge(config: SmallConfig, seconds: float, dies: bool) -> None:
    """Rank 0 judges for longer than a hang may last; every rank tells whether that was over when it ended."""
    done = Path(config.run_dir) / "judged"

    def judge(tracker: Any, device: torch.device) -> None:
        time.sleep(seconds)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        done.touch()

    train(config, judge=judge)
    print("ended after it was judged" if done.is_file() else "ended before it was judged")


def resume(config: SmallConfig, run_dirs: list[str]) -> None:
    """Each run to its end, one after the other."""
    world = world_of_environment()
    world.join()
    how: Any = {"hardware": config.hardware, "deepspeed": config.deepspeed, "optim": OPTIM}
    for run_dir in run_dirs:
        small_run(config.stage, Path(run_dir), world=world, global_batch=GLOBAL_BATCH, **how, **EVERY)
    close_world()


def plant(fault: Fault, stage: Any, loader: CellsLoader, run_dir: Path) -> None:
    """Let this rank's loader, or its loss, meet the fault."""
    deliver, compute = type(loader).__next__, stage.loss

    class Faulty(type(loader)):
        def __next__(self) -> list[Any]:
            if self.step in fault.steps and not fault.validating:
                meet(fault.kind, run_dir)
            return deliver(self)

    def loss(model: Any, batch: Any, draw: Any) -> Any:
        value, parts = compute(model, batch, draw)
        if draw.step in fault.steps and batch.positions_B[0] % 8 == 0:  # the first micro-batch of the rank
            if fault.kind == "loss":
                value = value * float("nan")
            elif fault.kind == "gradient":
                value = BadGradient.apply(value)
        return value, parts

    def validation(model: Any, batch: Any, draw: Any) -> Any:
        if fault.validating and loader.step in fault.steps and batch.positions_B[0] % 8 == 0 and not met:
            met.append(loader.step)
            meet(fault.kind, run_dir)
        return judge(model, batch, draw)

    met, judge = list[int](), stage.validation
    loader.__class__ = Faulty
    stage.loss, stage.validation = loss, validation


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * float("inf")


def meet(kind: str, run_dir: Path) -> None:
    if kind.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[kind])
    elif kind == "hang":
        time.sleep(1_000)
    elif kind == "loader":
        raise OSError("shard-000003.tar: Input/output error")
    elif kind == "memory":
        torch.empty(2**50)
    elif kind in ("stop", "save"):
        (run_dir / kind).touch()
        time.sleep(1.2 * LOOK_EVERY_S)
    elif kind == "disk":  # no file may grow beyond this: a write fails with an OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
