"""Every fault that a rank of two can meet: who says what, with which exit code, and that nothing is lost by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from scldm.train import steps
from scldm.train.tracking import TrackingConfig, read_metrics
from tests.launch import faulty
from tests.launch.faulty import STEPS, Fault, HardwareConfig, Ranks, SmallConfig
from tests.scldm.train.small_runs import stored

pytestmark = pytest.mark.slow

# DeepSpeed keeps parameters of fewer numbers whole; all of a small network's are such
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def setting_of(
    stage: str,
    zero_stage: int,
    precision: Literal["fp32", "bf16"],
    engine: Literal["deepspeed", "fsdp"] = "deepspeed",
) -> SmallConfig:
    hardware = HardwareConfig(engine, micro_batch=4, zero_stage=zero_stage, precision=precision)
    return SmallConfig("", stage=stage, hardware=hardware, deepspeed=SHARD_ALL if zero_stage == 3 else {})


# what is trained, and how; every fault is met in the first, some in the next two, the rest where time is no matter
SETTINGS = {
    "vae-zero2-fp32": setting_of("vae", 2, "fp32"),
    "ldm-zero3-bf16": setting_of("ldm", 3, "bf16"),
    "vae-fsdp3-fp32": setting_of("vae", 3, "fp32", "fsdp"),
    "vae-zero3-fp32": setting_of("vae", 3, "fp32"),
    "ldm-zero2-fp32": setting_of("ldm", 2, "fp32"),
    "vae-zero1-bf16": setting_of("vae", 1, "bf16"),
}
FIRST, SECOND, FSDP, *_ = SETTINGS


def latest_step(run_dir: Path) -> int:
    target = steps.pointed(run_dir / "checkpoints" / "latest")
    return 0 if target is None else int(target.name.removeprefix("step-"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a setting that meets no fault, made where it is first asked for."""

    @cache
    def run(setting: str) -> Path:
        run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
        codes, outputs = ranks.run(faulty.train, replace(SETTINGS[setting], run_dir=str(run_dir)))
        assert codes == [0, 0], outputs
        assert json.loads((run_dir / "outcome.json").read_text())["state"] == "finished"
        assert not (run_dir / "errors").exists()
        return run_dir

    return run


@pytest.fixture(scope="module")
def disturbed(ranks: Ranks, undisturbed: Callable[[str], Path]) -> Iterator[dict[str, list[Path]]]:
    """The runs of all tests here by setting; at the end they are resumed, in one start each, to the same weights."""
    runs: dict[str, list[Path]] = {setting: [] for setting in SETTINGS}
    yield runs
    for setting, of_setting in runs.items():
        if of_setting:
            codes, outputs = ranks.run(faulty.resume, SETTINGS[setting], [*map(str, of_setting)], timeout=300)
            assert codes == [0, 0], outputs
            for run in of_setting:
                assert_same_weights(run, undisturbed(setting))


def assert_same_weights(run: Path, other: Path) -> None:
    (state, tensors), (expected, other_tensors) = stored(run), stored(other)
    assert state["step"] == STEPS, run
    assert state["n_updates"] == expected["n_updates"], run
    different = [key for key in tensors if not torch.equal(tensors[key], other_tensors[key])]
    assert not different, (run, different)
    losses = [{row["step"]: row["loss"] for row in read_metrics(where, "train")} for where in (run, other)]
    assert losses[0] == losses[1]


# one fault or two; more of the train config; exit codes of both ranks; what each says; where the run then stands
FAULTS: dict[str, tuple[Any, ...]] = {
    "a killed rank": (Fault("SIGKILL"), {}, (87, -9), ("rank 1 (*) is gone", ""), {5, 8}),
    "the first is killed": (Fault("SIGKILL", 0), {}, (-9, 87), ("", "rank 0 (*) is gone"), {5, 8}),
    "a rank that hangs": (
        Fault("hang"),
        {"hang_s": 5.0},
        (87, 87),
        ("rank 1 (*) hangs: it waits for the cells of step 9 since", "rank 1 (*) hangs"),
        {5, 8},
    ),
    "a rank that hangs while it validates": (
        Fault("hang", 1, (8,), validating=True),
        {"hang_s": 5.0},
        (87, 87),
        ("stops: rank 1 (*) hangs: it validates batch 0 since", "stops: rank 1 (*) hangs"),
        {5},
    ),
    "a frozen rank": (
        Fault("SIGSTOP"),
        {"hang_s": 5.0},
        (87, None),
        ("rank 1 (*) hangs: it does not answer. Stacks of all ranks: ", ""),
        {5, 8},
    ),
    "the loader of a rank": (
        Fault("loader"),
        {},
        (1, 1),
        ("rank 1 (*) failed: OSError: shard-000003.tar: Input/output error", "Traceback"),
        {5, 8},
    ),
    "memory of a rank": (
        Fault("memory"),
        {},
        (1, 1),
        ("rank 1 (*) failed: *memory", "Traceback"),
        {5, 8},
    ),
    "a full disk": (
        Fault("disk"),
        {},
        (2, 2),
        ("could not be written (rank 1: OSError: *", "The last whole checkpoint is step-0000000"),
        {5, 8},
    ),
    "SIGTERM": (Fault("SIGTERM", 0), {}, (85, 85), ("saved step *, asked by SIGTERM on rank 0", ""), {10, 11}),
    "SIGUSR1": (Fault("SIGUSR1", 1), {}, (85, 85), ("saved step *, asked by SIGUSR1 on rank 1", ""), {10, 11}),
    "signals at different steps": (
        (Fault("SIGUSR1", 1, (8,)), Fault("SIGTERM", 0, (9,))),
        {},
        (85, 85),
        ("saved step *, asked by SIG", ""),
        {10, 11},
    ),
    "SIGTERM while it validates": (
        Fault("SIGTERM", 1, (8,), validating=True),
        {"save_every": 20},
        (85, 85),
        ("saved step 8, asked by SIGTERM on rank 1", ""),
        {8},
    ),
    "the file stop": (Fault("stop"), {}, (86, 86), ("asked by the file *stop", ""), {10, 11, 12}),
    "a loss on one rank": (
        Fault("loss", 1, (9, 10, 11, 12)),
        {"max_skipped": 2},
        (1, 1),
        (
            "step 10: rank 1: loss nan on cells (source:row) 0:*. The step is skipped",
            "step 11: rank 1: loss nan on cells (source:row) 0:*: 3 steps in a row, train.max_skipped=2",
        ),
        {5, 8},
    ),
    "a gradient on one rank": (
        Fault("gradient", 1, (9,)),
        {"max_skipped": 0},
        (1, 1),
        ("step 9: rank 1: gradient of * on cells (source:row) 0:*", "step 9: rank 1: gradient of"),
        {5, 8},
    ),
}
IN_SOME = {
    SECOND: ("a killed rank", "signals at different steps", "a gradient on one rank"),
    FSDP: ("a killed rank", "a gradient on one rank"),
}


def says(text: str, pattern: str) -> bool:
    at = 0
    for part in pattern.split("*"):
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def cases() -> Iterator[Any]:
    for setting in SETTINGS:
        for name in FAULTS:
            soon = setting == FIRST or name in IN_SOME.get(setting, ())
            yield pytest.param(setting, name, marks=() if soon else pytest.mark.exhaustive)


@pytest.mark.parametrize("setting, name", list(cases()))
def test_a_fault_on_one_rank_ends_both_names_it_and_costs_nothing(
    setting: str, name: str, ranks: Ranks, disturbed: dict[str, list[Path]], tmp_path: Path
) -> None:
    faults, more, codes, told, steps = FAULTS[name]
    fault, *_ = faults = faults if isinstance(faults, tuple) else (faults,)
    config = replace(SETTINGS[setting], run_dir=str(tmp_path / "run"))
    config = replace(config, train=replace(config.train, **more))
    found, outputs = ranks.run(faulty.train, config, *faults, timeout=40)
    assert tuple(found) == codes, "\n".join(outputs)
    for output, pattern in zip(outputs, told, strict=True):
        assert says(output, pattern), output
    assert sum(output.count("asked by") for output in outputs) == (codes[0] in (85, 86))  # one save, told once
    assert latest_step(tmp_path / "run") in steps
    stored(tmp_path / "run")
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    if found[0] != -9:
        expected = "stopped" if found[0] in (85, 86) else "failed"
        assert (outcome["state"], outcome["exit_code"]) == (expected, found[0])
    if fault.kind in ("hang", "SIGSTOP"):
        assert "loop.py" in (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()
    if fault.kind == "hang":
        assert "faulty.py" in (tmp_path / "run" / "stacks" / "rank-1.txt").read_text()
    if fault.kind in ("loss", "gradient"):
        rows = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
        assert {row["rank"] for row in rows} == {1}
        assert all(len(row["cells"]) == 4 for row in rows)
    assert not (tmp_path / "run" / "stop").exists()
    disturbed[setting].append(tmp_path / "run")


def test_one_step_that_is_skipped_changes_nothing_else(ranks: Ranks, tmp_path: Path) -> None:
    """The moments too: both ranks follow a plain run whose step is skipped as well."""
    plain = SmallConfig(str(tmp_path / "one"), hardware=faulty.HardwareConfig("plain", 16))
    codes, outputs = ranks.run(faulty.train, plain, Fault("loss", 0, (6,)), size=1)
    assert codes == [0], outputs
    expected, others = stored(tmp_path / "one")
    for setting in (FIRST, FSDP):
        follow = replace(SETTINGS[setting], run_dir=str(tmp_path / setting))
        codes, outputs = ranks.run(faulty.train, follow, Fault("loss", 1, (6,)))
        assert codes == [0, 0], outputs
        state, tensors = stored(tmp_path / setting)
        assert state["n_updates"] == expected["n_updates"] == STEPS - 1
        # a step more would move weights by the rate; what rounding moves in so few steps is far below
        assert max(float((tensors[key] - others[key]).abs().max()) for key in tensors) < faulty.OPTIM.lr / 15


def test_a_file_save_saves_once_and_training_goes_on(
    ranks: Ranks, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    config = SmallConfig(str(tmp_path / "run"))
    config = replace(config, train=replace(config.train, keep=20))
    codes, outputs = ranks.run(faulty.train, config, Fault("save", 1, (1,)))
    assert codes == [0, 0], outputs
    assert outputs[0].count("asked by the file") == 1
    saved = {int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert len(saved - {5, 8, 10, 15, 16}) <= 1
    assert not (tmp_path / "run" / "save").exists()
    assert_same_weights(tmp_path / "run", undisturbed(FIRST))


def test_an_exchange_that_gives_up_is_no_failure_of_who_waited(ranks: Ranks, tmp_path: Path) -> None:
    """Without hang_s nobody knows of the hang: another start may succeed, and all stacks are there to see why."""
    hardware = HardwareConfig("deepspeed", micro_batch=4, collective_timeout_s=8)
    config = SmallConfig(str(tmp_path / "run"), hardware=hardware)
    config = replace(config, train=replace(config.train, hang_s=0.0))
    codes, outputs = ranks.run(faulty.train, config, Fault("hang"), timeout=60)
    assert codes == [87, 87], outputs
    assert says(outputs[0], "rank 0 stops: rank 0 (*) waited in vain for another: "), outputs[0]
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["state"], outcome["exit_code"]) == ("failed", 87)
    assert "faulty.py" in (tmp_path / "run" / "stacks" / "rank-1.txt").read_text()


def test_the_tracked_run_of_a_hang_is_not_left_running(ranks: Ranks, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = SmallConfig(str(tmp_path / "run"), tracking=TrackingConfig(uri=uri, every_s=60.0))
    config = replace(config, train=replace(config.train, hang_s=8.0))
    codes, outputs = ranks.run(faulty.train, config, Fault("hang"), timeout=60)
    assert codes == [87, 87], outputs
    run = MlflowClient(uri).get_run(json.loads((tmp_path / "run" / "mlflow_run.json").read_text())["run_id"])
    assert run.info.status == "FAILED"
    assert len(MlflowClient(uri).get_metric_history(run.info.run_id, "train/loss")) == 9


def test_what_the_first_rank_refuses_ends_all(ranks: Ranks, undisturbed: Callable[[str], Path]) -> None:
    run = undisturbed(FIRST)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    config = SmallConfig(str(run), optim=replace(faulty.OPTIM, lr=1e-2))
    codes, outputs = ranks.run(faulty.train, config)
    assert codes == [2, 2], outputs
    assert "holds another run: optim.lr was 0.003, now 0.01" in outputs[0]
    assert says(outputs[1], "rank 1 stops: rank 0 (*) refuses: *holds another run"), outputs[1]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.name in ("config.json", "latest")} == {
        path: data for path, data in before.items() if path.name in ("config.json", "latest")
    }


def test_the_plain_engine_on_two_ranks_is_refused_before_a_folder_is_made(ranks: Ranks, tmp_path: Path) -> None:
    config = SmallConfig(str(tmp_path / "run"), hardware=faulty.HardwareConfig("plain", 8))
    codes, outputs = ranks.run(faulty.train, config)
    assert codes == [2, 2]
    assert all("hardware.engine=plain runs on one rank, not 2" in output for output in outputs)
    assert not (tmp_path / "run").exists()


def test_a_damaged_part_of_one_rank_is_passed_over_by_both(
    ranks: Ranks, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    config = SmallConfig(str(tmp_path / "run"))
    codes, outputs = ranks.run(faulty.train, config, Fault("stop", 1, (10,)))
    assert codes == [86, 86], outputs
    newest = steps.pointed(tmp_path / "run" / "checkpoints" / "latest")
    assert newest is not None
    part = newest / "part-0-of-1.safetensors"  # of one host, whose ranks share the reading
    part.write_bytes(part.read_bytes()[:-100] + bytes(100))
    codes, outputs = ranks.run(faulty.train, config)
    assert codes == [0, 0], outputs
    assert f"{newest.name} is passed over: {part} is damaged" in outputs[0]
    assert_same_weights(tmp_path / "run", undisturbed(FIRST))
