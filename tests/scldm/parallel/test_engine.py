"""DeepSpeed and FSDP2 on ranks against the plain engine, and checkpoints that cross engines and world sizes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config import compose
from launch.train_vae import TrainVAEConfig
from scldm.errors import InputError
from scldm.parallel.dist import World, close_world
from scldm.parallel.engine import DEEPSPEED, FSDPEngine, HardwareConfig, PlainEngine, check_engine, start_engine
from scldm.train.optim import OptimConfig, make_optimizer
from scldm.train.tracking import read_metrics
from tests.rounding import BF16_DIGIT, Undisturbed
from tests.scldm.train.small_runs import ALONE, Finished, make_dit, small_run, stored

ROOT = Path(__file__).resolve().parents[3]
STEPS = 30
# At six times this rate, training itself makes 1e-4 of the 1e-7 by which two orders of summation differ at first.
OPTIM: dict[str, Any] = {"lr": 5e-4, "clip": 2.0, "weight_decay": 0.01}
STAGES = ("vae", "ldm")
# DeepSpeed keeps parameters of fewer numbers whole; all of a small network's are such
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# and every two ranks keep whole weights between forward and backward, as a node would
IN_PAIRS = {"zero_optimization": {**SHARD_ALL["zero_optimization"], "zero_hpz_partition_size": 2, "overlap_comm": True}}


def test_the_norm_of_a_large_table_is_right_on_one_rank() -> None:
    """Of 36,130 genes: float32 over the whole table made it 6e-4 too small. DeepSpeed's two ranks had it right."""
    table = torch.randn(36_130, 256, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Embedding.from_pretrained(torch.zeros_like(table), freeze=False)
    engine = PlainEngine(module, partial(make_optimizer, OptimConfig()), HardwareConfig("plain"), 1.0, ALONE)
    engine.backward((module.weight * table).sum())
    assert engine.step(1e-3) == pytest.approx(float(table.double().norm()), rel=1e-6)


def run_ranks(n_ranks: int, jobs: list[dict], folder: Path) -> None:
    """The jobs on this many ranks, under torchrun as a user starts them."""
    table = folder / f"jobs-{n_ranks}-{len(list(folder.iterdir()))}.json"
    table.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    command += ["-m", "tests.scldm.parallel.follow", str(table)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3_000:]


def job(stage: str, run_dir: Path, micro_batch: int, zero_stage: int, **more) -> dict:
    hardware = {"engine": "deepspeed", "micro_batch": micro_batch, "zero_stage": zero_stage}
    hardware |= {key: more.pop(key) for key in ("engine", "precision", "offload_optimizer") if key in more}
    return {
        "stage": stage,
        "run_dir": str(run_dir),
        "hardware": hardware,
        "deepspeed": SHARD_ALL if zero_stage == 3 and hardware["engine"] == "deepspeed" else {},
        "steps": STEPS,
        "save_every": 10,
        "validate_every": 15,
        "optim": OPTIM,
        **more,
    }


def plain(stage: str, run_dir: Path, **more) -> Finished:
    """The same run on the plain engine, in this process."""
    return small_run(stage, run_dir, steps=STEPS, save_every=10, validate_every=15, optim=OptimConfig(**OPTIM), **more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Undisturbed]:
    """Each stage on the plain engine, one micro-batch a step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {stage: Undisturbed.of(folder / stage, partial(plain, stage)) for stage in STAGES}


@pytest.fixture(scope="module")
def coarsely(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Undisturbed]:
    """The same, beside runs that begin as far away as bfloat16 rounds."""
    folder = tmp_path_factory.mktemp("coarsely")
    return {stage: Undisturbed.of(folder / stage, partial(plain, stage), BF16_DIGIT) for stage in STAGES}


def assert_follows(run_dir: Path, oracle: Undisturbed, stage: str) -> None:
    """Loss and gradient norm of every step, validation, and the final weights and EMA.

    Rounding in another order is what differs, and the autoencoder's training amplifies it, by ten from step 5 to 20 and
    by ten again to 30. So what is allowed is measured step by step.
    """
    assert read_metrics(run_dir, "train")[-1]["step"] == STEPS
    metric = {"vae": "nll", "ldm": "velocity_loss"}[stage]
    oracle.assert_same(run_dir, {"loss": "train", "grad_norm": "train", metric: "validation"})
    oracle.assert_same_tensors(weights_of(run_dir), weights_of)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    _, tensors = stored(run_dir)
    return {key: value for key, value in tensors.items() if key.startswith(("weight/", "ema/"))}


@pytest.mark.slow
def test_ranks_follow_one_and_checkpoints_cross_stages_and_world_sizes(
    tmp_path: Path, undisturbed: dict[str, Undisturbed], coarsely: dict[str, Undisturbed]
) -> None:
    """One test, as starting ranks costs most: every start runs all that its world size has to do."""
    jobs: dict[int, list[dict]] = {2: [], 4: [], 1: []}
    follow, resumed, bf16 = [], [], []
    for stage in STAGES:
        for n_ranks, micro, zero in (
            *((2, 8, 1), (2, 2, 2), (2, 4, 3)),
            *((4, 4, 1) if stage == "ldm" else (4, 4, 2), (4, 2, 3)),
        ):
            run_dir = tmp_path / f"{stage}-zero{zero}-{n_ranks}x{micro}"
            more = {"deepspeed": IN_PAIRS} if (n_ranks, zero) == (4, 3) else {}
            jobs[n_ranks].append(job(stage, run_dir, micro, zero, **more))
            follow.append((run_dir, stage))
        zero = 2 if stage == "vae" else 3
        run_dir = tmp_path / f"{stage}-zero{zero}-offload-recompute"
        jobs[2].append(job(stage, run_dir, 8, zero, offload_optimizer=True, how={"recompute": True}))
        follow.append((run_dir, stage))
    # stopped at step 13, so that steps 11 to 13 are lost, and resumed at another world size, stage or engine
    for stage, (ranks, zero), (later_ranks, later_zero) in (
        ("vae", (2, 2), (4, 3)),
        ("ldm", (2, 3), (4, 1)),
        ("vae", (2, 3), (1, 2)),
        ("vae", (4, 3), (0, 0)),
        ("vae", (0, 0), (4, 3)),
        ("ldm", (0, 0), (2, 1)),
    ):
        run_dir = tmp_path / f"{stage}-{ranks}x{zero}-to-{later_ranks}x{later_zero}"
        resumed.append((run_dir, stage))
        if ranks:
            jobs[ranks].append(job(stage, run_dir, 4, zero, fail_at=13))
        else:
            with pytest.raises(KeyboardInterrupt):
                plain(stage, run_dir, fail_at=13)
        if later_ranks:
            jobs[later_ranks].append(job(stage, run_dir, 2, later_zero))
    for n_ranks, of_ranks in fsdp_jobs(tmp_path, follow, resumed, bf16).items():
        jobs[n_ranks] += of_ranks
    # last: what DeepSpeed notes of a precision, it notes for the process
    for stage, zero in (("vae", 3), ("ldm", 2)):
        run_dir = tmp_path / f"{stage}-bf16-{zero}"
        jobs[2].append(job(stage, run_dir, 8, zero, precision="bf16"))
        bf16.append((run_dir, stage))
    for n_ranks, of_ranks in jobs.items():
        run_ranks(n_ranks, of_ranks, tmp_path)
    for run_dir, stage in follow:
        assert_follows(run_dir, undisturbed[stage], stage)
    for run_dir, stage in resumed:
        if run_dir.name.endswith("-to-0x0"):
            plain(stage, run_dir)
        assert_follows(run_dir, undisturbed[stage], stage)
    for run_dir, stage in bf16:
        coarsely[stage].assert_near(run_dir, "loss")


Runs = list[tuple[Path, str]]


def fsdp_jobs(folder: Path, follow: Runs, resumed: Runs, bf16: Runs) -> dict[int, list[dict]]:
    """FSDP2's part of the test above: number of ranks -> its jobs. The runs are added to those that are looked at."""
    on_two = [
        job("vae", folder / "vae-fsdp2-2x2", 2, 2, engine="fsdp"),
        job("ldm", folder / "ldm-fsdp3-2x4", 4, 3, engine="fsdp"),
        job("vae", folder / "vae-fsdp3-offload", 8, 3, engine="fsdp", offload_optimizer=True, how={"recompute": True}),
    ]
    follow += [(Path(of["run_dir"]), of["stage"]) for of in on_two]
    # a run that it begins goes on under DeepSpeed or plain, and the reverse, on another number of ranks
    to_deepspeed, of_deepspeed = folder / "vae-fsdp-2-to-deepspeed-4", folder / "ldm-deepspeed-2-to-fsdp-4"
    to_plain, of_plain = folder / "ldm-fsdp-to-0x0", folder / "vae-plain-to-fsdp-2"
    on_two += [
        job("vae", to_deepspeed, 4, 3, engine="fsdp", fail_at=13),
        job("ldm", of_deepspeed, 4, 3, fail_at=13),
        job("ldm", to_plain, 8, 2, engine="fsdp", fail_at=13),
        job("vae", of_plain, 4, 2, engine="fsdp"),
        job("vae", folder / "vae-fsdp-bf16", 8, 3, engine="fsdp", precision="bf16"),
    ]
    with pytest.raises(KeyboardInterrupt):
        plain("vae", of_plain, fail_at=13)
    on_four = [job("vae", to_deepspeed, 2, 2), job("ldm", of_deepspeed, 4, 2, engine="fsdp")]
    resumed += [(to_deepspeed, "vae"), (of_deepspeed, "ldm"), (to_plain, "ldm"), (of_plain, "vae")]
    bf16.append((folder / "vae-fsdp-bf16", "vae"))
    return {2: on_two, 4: on_four}


@pytest.mark.exhaustive  # three minutes, most of them torch's compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_blocks_train_as_they_do_uncompiled(tmp_path: Path, undisturbed: dict[str, Undisturbed]) -> None:
    """Under ZeRO-3 too, whose gathering of weights around every layer breaks a block's compiled code into parts."""
    ways = [("deepspeed", 2), ("deepspeed", 3), ("fsdp", 3)]
    jobs = [job("vae", tmp_path / f"{way}{zero}", 8, zero, engine=way, how={"compile": True}) for way, zero in ways]
    run_ranks(2, jobs, tmp_path)
    for way, zero in ways:
        assert_follows(tmp_path / f"{way}{zero}", undisturbed["vae"], "vae")


@pytest.mark.parametrize(
    "micro_batch, global_batch, n_ranks, said",
    [
        (
            5,
            16,
            1,
            "over 1 ranks with hardware.micro_batch=5. .*: hardware.micro_batch 4 or 8; train.global_batch 15 or 20$",
        ),
        (16, 16, 2, "over 2 ranks with .*: world size 1; hardware.micro_batch 8; train.global_batch 32$"),
        (4, 18, 4, "train.global_batch=18 can't be split over 4 ranks with .*allowed: train.global_batch 16 or 32$"),
        (1, 1, 2, "train.global_batch=1 can't be split over 2 ranks .*allowed: world size 1; train.global_batch 2$"),
    ],
)
def test_batches_that_do_not_fit_are_refused_with_ones_that_do(micro_batch, global_batch, n_ranks, said: str) -> None:
    with pytest.raises(InputError, match=said):
        HardwareConfig(micro_batch=micro_batch).accumulation(global_batch, n_ranks)


def test_accumulation_and_what_else_can_not_be() -> None:
    assert HardwareConfig(micro_batch=4).accumulation(32, 2) == 4
    mistakes: dict[str, dict[str, Any]] = {
        "zero_stage=0 must be from 1 to 3": {"zero_stage": 0},
        "micro_batch=0": {"micro_batch": 0},
        "threads=0": {"threads": 0},
        "zero_stage=1: hardware.engine=fsdp shards gradients and weights too": {"engine": "fsdp", "zero_stage": 1},
    }
    for said, wrong in mistakes.items():
        with pytest.raises(InputError, match=said):
            HardwareConfig(**wrong)
    optim = OptimConfig()
    with pytest.raises(InputError, match="hardware.engine=plain runs on one rank, not 2"):
        start_engine(
            make_dit(),
            lambda m: make_optimizer(optim, m),
            HardwareConfig(engine="plain", micro_batch=4),
            1.0,
            World(0, 2, torch.device("cpu")),
            16,
        )


@pytest.mark.parametrize("found", ["0.19.0", "0.20.0", None])
def test_another_deepspeed_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(package: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)
    said = rf"deepspeed is {found or 'not installed'}, .* pip install deepspeed=={DEEPSPEED}"
    with pytest.raises(InputError, match=said):
        check_engine(HardwareConfig("deepspeed"), ALONE, {})
    assert check_engine(HardwareConfig("auto"), ALONE, {}) == "plain"
    assert check_engine(HardwareConfig("fsdp"), ALONE, {}) == "fsdp"


def test_a_torch_whose_fsdp_divides_gradients_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
    with pytest.raises(
        InputError, match=rf"hardware.engine=fsdp: FSDP2 of torch {re.escape(torch.__version__)} always"
    ):
        check_engine(HardwareConfig("fsdp"), ALONE, {})


def test_a_cpu_is_refused_where_a_gpu_is_required() -> None:
    """As presets for GPUs do."""
    for name in ("one_gpu", "node_8gpu", "many_nodes", "many_nodes_zero3"):
        hardware = compose(TrainVAEConfig, [f"hardware/{name}", "data.shards=s", "run_dir=r"]).hardware
        with pytest.raises(InputError, match="hardware.require_gpu=true: torch finds no GPU. .*=false"):
            check_engine(hardware, ALONE, {})
        assert check_engine(replace(hardware, require_gpu=False), ALONE, {}) == "deepspeed"


def test_the_deepspeed_that_is_installed_asked_for_and_pinned_is_the_one() -> None:
    assert check_engine(HardwareConfig("deepspeed"), ALONE, {}) == "deepspeed"
    assert f'"deepspeed=={DEEPSPEED}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\ndeepspeed=={DEEPSPEED}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.heavy
def test_one_process_on_a_cpu_needs_no_deepspeed() -> None:
    module, make = make_dit(), partial(make_optimizer, OptimConfig())
    assert isinstance(
        start_engine(module, make, HardwareConfig(micro_batch=4), 1.0, World(0, 1, torch.device("cpu")), 4), PlainEngine
    )


@pytest.mark.heavy
def test_fsdp_on_one_rank_follows_plain_and_says_what_has_no_effect(
    tmp_path: Path, undisturbed: dict[str, Undisturbed], capsys: pytest.CaptureFixture
) -> None:
    hardware = HardwareConfig("fsdp", 4, zero_stage=3)
    try:
        plain("vae", tmp_path / "fsdp", hardware=hardware, deepspeed=SHARD_ALL)
        of_many: Any = FSDPEngine(make_dit(), partial(make_optimizer, OptimConfig()), hardware, 1.0, ALONE, 4)
        of_many.n_done = 1
        assert of_many.step(0.1) == 0, "as on a rank that has no row of any parameter"
        of_many.rows = {name: rows.clone() for name, rows in of_many.rows.items()}
        of_many.n_done, of_many.are_rows_checked = 1, False
        with pytest.raises(InputError, match="moves .* after the start. Install the torch of constraints.txt"):
            of_many.step(0.1)
    finally:
        close_world()
    assert_follows(tmp_path / "fsdp", undisturbed["vae"], "vae")
    assert "scldm: hardware.engine=fsdp: the keys of deepspeed have no effect" in capsys.readouterr().err


@pytest.mark.heavy
def test_accumulation_on_the_plain_engine_is_one_large_batch(
    tmp_path: Path, undisturbed: dict[str, Undisturbed]
) -> None:
    for stage in STAGES:
        plain(stage, tmp_path / stage, hardware=HardwareConfig("plain", 4))
        assert_follows(tmp_path / stage, undisturbed[stage], stage)


@pytest.mark.heavy
def test_bf16_on_the_plain_engine_stays_near_and_keeps_float32_weights(
    tmp_path: Path, coarsely: dict[str, Undisturbed]
) -> None:
    run = plain("vae", tmp_path / "bf16", hardware=HardwareConfig("plain", 16, precision="bf16"))
    coarsely["vae"].assert_near(tmp_path / "bf16", "loss")
    assert all(p.dtype == torch.float32 for p in run.engine.module.parameters())
