"""DeepSpeed on one and two ranks against the plain engine, and checkpoints that cross engines and world sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scldm.errors import InputError
from scldm.parallel.dist import World
from scldm.parallel.engine import HardwareConfig, start_engine
from scldm.train import checkpoint
from scldm.train.optim import OptimConfig, make_optimizer
from scldm.train.tracking import read_metrics
from tests.scldm.train.small_runs import Finished, make_dit, small_run

ROOT = Path(__file__).resolve().parents[3]
STEPS = 30
# At six times this rate, training itself makes 1e-4 of the 1e-7 by which two orders of summation differ at first.
OPTIM: dict[str, Any] = {"lr": 5e-4, "clip": 2.0, "weight_decay": 0.01}
STAGES = ("vae", "ldm")


def run_ranks(n_ranks: int, jobs: list[dict], folder: Path) -> None:
    """The jobs on this many ranks, under torchrun as a user starts them."""
    table = folder / f"jobs-{n_ranks}-{len(list(folder.iterdir()))}.json"
    table.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    command += ["-m", "tests.scldm.parallel.follow", str(table)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3_000:]


def job(stage: str, run_dir: Path, micro_batch: int, zero_stage: int = 2, precision: str = "fp32", **more) -> dict:
    hardware = {"engine": "deepspeed", "micro_batch": micro_batch, "zero_stage": zero_stage, "precision": precision}
    return {
        "stage": stage,
        "run_dir": str(run_dir),
        "hardware": hardware,
        "steps": STEPS,
        "save_every": 10,
        "optim": OPTIM,
        **more,
    }


def plain(stage: str, run_dir: Path, **more) -> Finished:
    """The same run on the plain engine, in this process."""
    return small_run(stage, run_dir, steps=STEPS, save_every=10, optim=OptimConfig(**OPTIM), **more)


def curve(run_dir: Path, key: str, split: str = "train") -> torch.Tensor:
    rows = read_metrics(run_dir, split)
    assert rows[-1]["step"] == STEPS
    return torch.tensor([row[key] for row in rows], dtype=torch.float64)


def assert_follows(run_dir: Path, oracle: Path, stage: str) -> None:
    """Loss and gradient norm of every step, validation, and the final weights and averages."""
    metric = {"vae": "nll", "ldm": "velocity_loss"}[stage]
    # the norm moves most: it is taken where the loss is steep
    for key, split, tolerance in (("loss", "train", 1e-5), ("grad_norm", "train", 2e-4), (metric, "validation", 1e-5)):
        one, other = curve(run_dir, key, split), curve(oracle, key, split)
        assert one.shape == other.shape
        worst = float((one / other - 1).abs().max())
        assert worst < tolerance, (run_dir.name, key, worst)
    weights, expected = weights_of(run_dir), weights_of(oracle)
    assert weights.keys() == expected.keys()
    # 30 steps of 5e-4 move a weight by 1e-2
    worst = max(float((weights[key] - expected[key]).abs().max()) for key in expected)
    assert worst < 2e-4, (run_dir.name, worst)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    target = checkpoint.pointed(run_dir / "checkpoints" / "latest")
    assert target is not None
    tensors = checkpoint.read_tensors(target, checkpoint.read_state(target))
    return {key: value for key, value in tensors.items() if key.startswith(("weight/", "ema/"))}


@pytest.mark.slow
def test_deepspeed_follows_the_plain_engine_and_resumes_across_world_sizes(tmp_path: Path) -> None:
    """One test, as starting ranks costs most: every start runs all that its world size has to do."""
    follow, cross, bf16 = [], [], []
    one_rank, two_ranks, second_two = [], [], []
    for stage in STAGES:
        plain(stage, tmp_path / f"{stage}-plain")
        for jobs, ranks, zero, micro in (
            (one_rank, 1, 1, 16),
            (one_rank, 1, 2, 4),
            (two_ranks, 2, 1, 2),
            (two_ranks, 2, 2, 8),
        ):
            run_dir = tmp_path / f"{stage}-zero{zero}-{ranks}x{micro}"
            jobs.append(job(stage, run_dir, micro, zero))
            follow.append((run_dir, stage))
        # stopped at step 13, so that steps 11 to 13 are lost, and resumed at another world size, stage or engine
        for name in ("two-to-one", "two-to-plain"):
            two_ranks.append(job(stage, tmp_path / f"{stage}-{name}", 8, 2, fail_at=13))
        one_rank.append(job(stage, tmp_path / f"{stage}-two-to-one", 16, 1))
        one_rank.append(job(stage, tmp_path / f"{stage}-one-to-two", 16, 1, fail_at=13))
        second_two.append(job(stage, tmp_path / f"{stage}-one-to-two", 4, 2))
        second_two.append(job(stage, tmp_path / f"{stage}-plain-to-two", 4, 2))
        cross += [
            (tmp_path / f"{stage}-{n}", stage) for n in ("two-to-one", "two-to-plain", "one-to-two", "plain-to-two")
        ]
        for zero in (1, 2):
            two_ranks.append(job(stage, tmp_path / f"{stage}-bf16-{zero}", 8, zero, "bf16"))
            bf16.append((tmp_path / f"{stage}-bf16-{zero}", stage))
        with pytest.raises(KeyboardInterrupt):
            plain(stage, tmp_path / f"{stage}-plain-to-two", fail_at=13)
    run_ranks(2, two_ranks, tmp_path)
    run_ranks(1, one_rank, tmp_path)
    run_ranks(2, second_two, tmp_path)
    for stage in STAGES:
        plain(stage, tmp_path / f"{stage}-two-to-plain")
    for run_dir, stage in [*follow, *cross]:
        assert_follows(run_dir, tmp_path / f"{stage}-plain", stage)
    for run_dir, stage in bf16:
        loss, expected = curve(run_dir, "loss"), curve(tmp_path / f"{stage}-plain", "loss")
        worst = float((loss / expected - 1).abs().max())
        assert 1e-6 < worst < 0.02, (run_dir.name, worst)  # it is another precision, and not another result


@pytest.mark.parametrize(
    "micro_batch, global_batch, n_ranks, said",
    [
        (5, 16, 1, "hardware.micro_batch=5 on 1 ranks does not divide train.global_batch=16; .* 1, 2, 4, 8, 16"),
        (16, 16, 2, "hardware.micro_batch=16 on 2 ranks .* that do: 1, 2, 4, 8$"),
        (4, 18, 4, "train.global_batch=18 can't be split over 4 ranks; the nearest that can is 16"),
        (1, 1, 2, "train.global_batch=1 can't be split over 2 ranks; the nearest that can is 2"),
    ],
)
def test_batches_that_do_not_fit_are_refused_with_ones_that_do(micro_batch, global_batch, n_ranks, said: str) -> None:
    with pytest.raises(InputError, match=said):
        HardwareConfig(micro_batch=micro_batch).accumulation(global_batch, n_ranks)


def test_accumulation_and_what_else_can_not_be() -> None:
    assert HardwareConfig(micro_batch=4).accumulation(32, 2) == 4
    mistakes: dict[str, dict[str, Any]] = {
        "zero_stage=3": {"zero_stage": 3},
        "micro_batch=0": {"micro_batch": 0},
        "threads=0": {"threads": 0},
    }
    for said, wrong in mistakes.items():
        with pytest.raises(InputError, match=said):
            HardwareConfig(**wrong)
    optim = OptimConfig()
    with pytest.raises(InputError, match="hardware.engine=plain runs on one rank, not on 2"):
        start_engine(
            make_dit(),
            lambda m: make_optimizer(optim, m),
            HardwareConfig(engine="plain", micro_batch=4),
            1.0,
            World(0, 2, torch.device("cpu")),
            16,
        )


def test_accumulation_on_the_plain_engine_is_one_large_batch(tmp_path: Path) -> None:
    for stage in STAGES:
        for name, micro in (("whole", 16), ("cut", 4)):
            plain(stage, tmp_path / stage / name, hardware=HardwareConfig("plain", micro))
        assert_follows(tmp_path / stage / "cut", tmp_path / stage / "whole", stage)


def test_bf16_on_the_plain_engine_stays_near_and_keeps_float32_weights(tmp_path: Path) -> None:
    plain("vae", tmp_path / "fp32")
    run = plain("vae", tmp_path / "bf16", hardware=HardwareConfig("plain", 16, precision="bf16"))
    worst = float((curve(tmp_path / "bf16", "loss") / curve(tmp_path / "fp32", "loss") - 1).abs().max())
    assert 1e-6 < worst < 0.02
    assert all(p.dtype == torch.float32 for p in run.engine.module.parameters())
