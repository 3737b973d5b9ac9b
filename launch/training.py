"""What the two training verbs share: from a config to a finished run folder."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.format.schema import Manifest
from data_pipeline.stream.loader import StreamConfig
from launch.followed import dataset_of
from launch.planned import CPU
from launch.run_data import check_data, data_of, keep_data
from scldm import pretrained
from scldm.checked import Checked
from scldm.environment import git_diff
from scldm.errors import InputError, Stopped
from scldm.files import disk_explained, flat, space_explained, write_json, written_aside
from scldm.model.attention import Choice
from scldm.parallel.deepspeed_json import check_overrides
from scldm.parallel.dist import World, close_world, world_of_environment
from scldm.parallel.engine import HardwareConfig, check_engine, start_engine
from scldm.parallel.surface import Engine
from scldm.parallel.watch import SOONER_S, Watch
from scldm.pretrained import Pretrained
from scldm.train.branch import begins, find
from scldm.train.changes import CHANGES
from scldm.train.init_from import Joined
from scldm.train.loop import Loader, TrainConfig, train
from scldm.train.losses import Stage
from scldm.train.machine import place_of
from scldm.train.optim import OptimConfig, make_optimizer
from scldm.train.previews import Make, Previews
from scldm.train.requests import Requests
from scldm.train.run_folder import DIFFS, PLAN, open_run_folder, outcome_noted, step_of
from scldm.train.step_cost import StepCost
from scldm.train.steps import pointed
from scldm.train.throughput import PEAK_TFLOPS, Meter, gpu_name, peak_flops
from scldm.train.tracking import Tracker, TrackingConfig, check_tracking

PLAN_AFTER_S = 60.0  # a run that ends sooner needs no plan
# what a resume may change: where and how fast a run goes, how it is followed, but not what it computes. `data.shards`
# is a place: that the cells there are the same is proved by the loader's state and the vocabularies
FREE_ON_RESUME = (
    *("run_dir", "tracking", "train.log_every", "train.save_every", "train.keep", "train.keep_every"),
    *("train.patience", "train.max_skipped", "train.hang_s", "train.stop_signals", "train.preview_share"),
    *("model.attention", "model.compile", "model.recompute", "model.gene_chunk"),
    *("hardware.engine", "hardware.require_gpu", "hardware.micro_batch", "hardware.zero_stage", "hardware.threads"),
    *("hardware.offload_optimizer", "hardware.collective_timeout_s", "hardware.peak_tflops"),
    *("deepspeed", "train.rank_logs", "gate", "min_gene_share"),
    *("data.shards", "data.form", "data.prefetch", "data.read_threads", "data.read_ahead"),
    *("data.cache_folder", "data.cache_gb"),
)

# what changes the course of a run and leaves it the same: with allow_changes, or in a branch
CAN_CHANGE = ("optim", "train", "guidance", "flow", "hardware.precision")
WHY_NEVER = {
    "model": "the weights have the shape and the meaning that it says",
    **dict.fromkeys(("data", "given", "vae", "label_embeddings"), "a run is of one set of cells, in one order"),
    "init_from": "the weights began with it",
}

# keys that say how this start goes on with a run, and nothing of the run itself: its config.json has none of them
OF_A_START = ("branch_from", "allow_changes")

# files that MLflow gets too
STARTED_WITH = ("config.json", "environment.json", "deepspeed.json", "init_from.json", CHANGES)


@dataclass(frozen=True)
class RunConfig(Checked):
    """What the configs of both stages have. `data` and `model` are the stage's own.

    run_dir: folder of the run
    branch_from: RUN@STEP, as runs/vae@15000 or @latest or @best: a new run that begins with that checkpoint, its place
        in the cells' order included. Give the parent's keys again. Those of optim, train and
        hardware.precision may differ, and of ldm those of guidance and flow
    allow_changes: keys that may differ from the run's config.json, as optim.lr,train.steps. Each change is noted in
        changes.json with its step. Those of optim, train and hardware.precision can change, and of ldm
        those of guidance and flow
    deepspeed: any key of DeepSpeed's own configuration that does not change the result, as deepspeed.steps_per_print=9.
        Other engines have no use for it
    """

    run_dir: str
    data: StreamConfig
    init_from: str = ""
    branch_from: str = ""
    allow_changes: list[str] = field(default_factory=list)
    model: Any = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_waits(self)
        check_changes(self)

    def place(self, world: World) -> dict[str, Any]:
        """Which batches a loader gives, and where."""
        return {
            "rank": world.rank,
            "world_size": world.size,
            "global_batch": self.train.global_batch,
            "micro_batch": self.hardware.micro_batch,
            "device": world.device,
        }


class Parts(NamedTuple):
    """What one stage trains, on which stream of which shard set.

    joined: how its names met those of `init_from`
    cost: of a micro-batch
    attention: how the autoencoder's is computed, and why, where there is one
    preview: what makes previews, on the first rank where there are any
    """

    module: torch.nn.Module
    stage: Stage
    loader: Loader
    validation: Loader
    manifest: Manifest
    joined: Sequence[Joined] = ()
    cost: Callable[[], StepCost] | None = None
    attention: Choice | None = None
    preview: Make | None = None


def run_training(
    name: str,
    config: RunConfig,
    set_up: Callable[[World], Parts],
    judge: Callable[[Tracker, torch.device], None] | None = None,
) -> dict[str, float]:
    """Train, or resume, the run of this config. Returns the last validation metrics. Every rank calls it.

    judge: what the first rank does with the run that reached its end, before its tracker closes

    Raises: Stopped where that was asked from outside, InputError. Where one rank fails, the others end with it.
    """
    world = world_of_environment()
    torch.set_num_threads(config.hardware.threads)
    config.hardware.accumulation(config.train.global_batch, world.size)
    check_overrides(config.deepspeed)
    check_engine(config.hardware, world, config.deepspeed)
    check_tracking(config.tracking, Path(config.run_dir))  # on every rank, before any waits for another
    run_dir = Path(config.run_dir)
    as_dict = asdict(config)
    for key in OF_A_START:
        del as_dict[key]
    # what is at the end told to the scheduler and to the other ranks comes before what takes its time: the tracker
    with ExitStack() as last, ExitStack() as at_the_end:
        world.join(config.hardware.collective_timeout_s)
        at_the_end.push(lambda kind, *_: close_world() if world.size == 1 or kind in (None, Stopped) else None)
        watch = at_the_end.enter_context(Watch(world, config.train.hang_s))
        requests = last.enter_context(Requests(run_dir, config.train.stop_signals, world))
        torch.manual_seed(config.train.seed)
        parts = set_up(world)
        if world.is_first:
            notes = {"attention": str(parts.attention)} if parts.attention else {}
            if diff := git_diff():
                notes["diff"] = f"{DIFFS}/{hashlib.sha256(diff.encode()).hexdigest()[:12]}.diff"
            branch = find(config.branch_from) if begins(config.branch_from, run_dir) else None
            if branch is not None:
                check_data(branch.checkpoint, data_of(parts.manifest), f"branch_from={branch}")
            check_data(run_dir, data_of(parts.manifest), str(run_dir))  # before anything there is written
            allowed = tuple(config.allow_changes)
            if branch is not None or allowed:
                check_steps(config, branch.step if branch else step_of(run_dir))
            opened = open_run_folder(
                run_dir, as_dict, FREE_ON_RESUME, notes, can_change=CAN_CHANGE, allowed=allowed, branch=branch
            )
            with disk_explained(str(run_dir)):
                last.enter_context(opened)
                for what, of in notes.items():
                    print(f"scldm: {what}: {of}", file=sys.stderr, flush=True)
                watch.on_end = at_the_end.enter_context(outcome_noted(run_dir))
                keep_data(run_dir, parts.manifest)
                if diff:
                    (run_dir / DIFFS).mkdir(exist_ok=True)
                    with written_aside(run_dir / notes["diff"]) as file:
                        file.write(diff.encode())
                if parts.joined:
                    keep_joined(run_dir, config.init_from, parts.joined)
        world.barrier()  # no rank goes on where the first refuses
        watch.folder = run_dir
        make = partial(make_optimizer, config.optim)
        engine = start_engine(
            parts.module, make, config.hardware, config.optim.clip, world, config.train.global_batch, config.deepspeed
        )
        if world.is_first:
            with disk_explained(str(run_dir)):
                write_json(run_dir / "deepspeed.json", getattr(engine, "json", {}))
        peak = peak_flops(world.device, config.hardware.precision, config.hardware.peak_tflops)
        flops = parts.cost().flops / config.hardware.micro_batch if peak and parts.cost and world.is_first else 0.0
        hosts = world.gather(socket.gethostname())
        place = place_of(hosts, world.rank)
        told: dict[str, Any] = {"stage": name, "params": as_dict, "place": place}
        if world.is_first and config.tracking.enabled:
            shards = config.data.shards
            told["datasets"] = [dataset_of(shards, "training")] if shards else []
            told["tags"] = {"branch_from": config.branch_from} if config.branch_from else {}
            if place.node and "SLURM_JOB_NODELIST" not in os.environ:
                told["tags"]["hosts"] = ",".join(dict.fromkeys(hosts))
        tracker = last.enter_context(Tracker(run_dir, config.tracking, active=world.is_first, **told))
        for kept in [run_dir / file for file in STARTED_WITH if world.is_first and (run_dir / file).is_file()]:
            tracker.log_artifact(kept)
        for path in sorted(run_dir.glob(f"{DIFFS}/*")):
            tracker.log_artifact(path, DIFFS)
        last.callback(tag_checkpoints, tracker, run_dir)
        machine = machine_of(config.hardware, world, place.n_nodes) if config.data.shards else {}
        if machine and config.tracking.enabled and world.is_first:
            last.enter_context(planned(name.split()[-1], run_dir, machine))
            tracker.log_artifact(run_dir / PLAN)  # sent once it is there
        note_cause = watch.on_end

        def end(reason: str, code: int) -> None:
            note_cause(reason, code)
            tracker.close("FAILED")

        watch.on_end = end
        with space_explained(str(run_dir)):
            metrics = train(
                parts.stage,
                engine,
                parts.loader,
                parts.validation,
                config.train,
                config.optim,
                world,
                run_dir,
                tracker,
                name,
                watch,
                requests,
                Meter(world, flops, peak),
                previews_of(parts, config, engine, run_dir, tracker, requests),
            )
        scores = {key: value for key, value in metrics.items() if key != "cells"}
        tracker.log_on_parent(scores, name.split()[-1])
        if judge is not None:
            del engine, parts  # what is judged comes from the checkpoint, and may need their memory
            watch.let_first(lambda: judge(tracker, world.device))
        return metrics


def previews_of(
    parts: Parts, config: RunConfig, engine: Engine, run_dir: Path, tracker: Tracker, requests: Requests
) -> Previews:
    """What the first rank shows at validations. Nothing where a rank has no whole network."""
    make, train = parts.preview, config.train
    if make is not None and not engine.is_whole:
        print("scldm: no previews: no rank has the whole network under ZeRO-3 and FSDP2", file=sys.stderr, flush=True)
        make = None
    limit_s = min(train.hang_s or math.inf, config.hardware.collective_timeout_s) / 2
    device = requests.world.device
    return Previews(run_dir, tracker, make, train.preview_share, limit_s, device, lambda: requests.caught > 0)


def machine_of(hardware: HardwareConfig, world: World, nodes: int) -> dict[str, Any]:
    """What this run's machine is, as keys of PlannedHardware."""
    machine: dict[str, Any] = {"nodes": nodes, "gpus_per_node": -(-world.size // nodes)}
    if world.device.type != "cuda":
        return machine | CPU
    kind, memory = gpu_name(world.device), torch.cuda.get_device_properties(world.device).total_memory
    known = {} if hardware.peak_tflops and kind not in PEAK_TFLOPS else {"gpu": kind}
    return {**machine, **known, "memory_gb": memory / 1e9}


@contextmanager
def planned(stage: str, run_dir: Path, machine: Mapping[str, Any]) -> Iterator[None]:
    """Within, after PLAN_AFTER_S, a process with little priority writes the run's plan. It ends with the run."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # -P: a launch.py in the user's folder is not ours
    words = [sys.executable, "-P", "-m", "launch.planning.of_run", stage, str(run_dir), json.dumps(machine)]
    words.append(str(os.getpid()))
    env, started = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}, list[subprocess.Popen]()

    def start() -> None:
        try:
            started.append(subprocess.Popen(words, env=env, start_new_session=True))
        except OSError as error:
            print(f"scldm: no {PLAN}: {error}", file=sys.stderr, flush=True)

    timer = threading.Timer(PLAN_AFTER_S, start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
                if not (run_dir / PLAN).is_file():
                    print(f"scldm: no {PLAN}: the run ended before it was made", file=sys.stderr, flush=True)


def tag_checkpoints(tracker: Tracker, run_dir: Path) -> None:
    """Where the checkpoints lie: MLflow gets no copies."""
    of = {which: pointed(run_dir.resolve() / "checkpoints" / which) for which in ("latest", "best")}
    tracker.tag(**{f"checkpoint.{which}": str(path) for which, path in of.items() if path})


def check_waits(config: RunConfig) -> None:
    """Raises: InputError where an exchange would give up before a hang is found, and so who hangs."""
    hang_s, timeout_s = config.train.hang_s, config.hardware.collective_timeout_s
    if hang_s and timeout_s < hang_s + SOONER_S:
        raise InputError(
            f"hardware.collective_timeout_s={timeout_s} must be at least {hang_s + SOONER_S:g}, that is train.hang_s="
            f"{hang_s:g} and {SOONER_S:g} s more: else a rank that hangs is not named"
        )


def check_changes(config: RunConfig) -> None:
    """Raises: InputError for a key of allow_changes that there is not, or that can never change."""
    keys = [key for key, _ in flat(asdict(config))]
    for name in config.allow_changes:
        within = [key for key in keys if f"{key}.".startswith(f"{name}.")]
        if not within:
            near = difflib.get_close_matches(name, keys, n=3, cutoff=0.5)
            raise InputError(f"allow_changes={name}: no such key. Did you mean {', '.join(near or CAN_CHANGE)}?")
        may = (*CAN_CHANGE, *FREE_ON_RESUME)
        if never := [key for key in within if not any(f"{key}.".startswith(f"{group}.") for group in may)]:
            why = WHY_NEVER.get(never[0].split(".")[0], "it would be another run")
            raise InputError(f"allow_changes={name}: {never[0]} can't change in a run: {why}. Choose another run_dir")


def check_steps(config: RunConfig, step: int) -> None:
    """Raises: InputError where the run is already beyond its end."""
    if config.train.steps < step:
        raise InputError(
            f"train.steps={config.train.steps}: the run is at step {step} already. Give more, or branch_from=RUN@STEP "
            "of an earlier checkpoint"
        )


def start_of(config: RunConfig) -> Pretrained | None:
    """The trained model that a run starts from, if any and if it has not started yet."""
    return pretrained.load(config.init_from) if config.init_from and not has_started(config) else None


def has_started(config: RunConfig) -> bool:
    """Whether the run has a checkpoint, from which it goes on: its own, or the one that it branches from."""
    return bool(config.branch_from) or (Path(config.run_dir) / "checkpoints" / "latest").is_file()


def keep_joined(run_dir: Path, model: str, joined: Sequence[Joined]) -> None:
    """Print how the data's names met the trained ones, and keep all of them in the run folder."""
    for table in joined:
        print(f"init_from {model}: {table}", file=sys.stderr, flush=True)
    write_json(run_dir / "init_from.json", {"model": model, **{table.what: table.to_json() for table in joined}})


def check_has_validation(manifest: Manifest, shards: str) -> None:
    """Raises: InputError for a set without validation cells: training is judged by them."""
    if not any(split.name == "validation" and split.n_cells for split in manifest.splits):
        raise InputError(f"{shards} has no validation cells. Write the shards with split.validation above 0")


def whole_cells(micro_batch: int, n_in_training: int, n_genes: int) -> int:
    """Cells per forward pass over all genes: the largest divisor of the micro-batch that has no more counts than it."""
    fitting = max(1, micro_batch * n_in_training // n_genes)
    return max(m for m in range(1, fitting + 1) if micro_batch % m == 0)
