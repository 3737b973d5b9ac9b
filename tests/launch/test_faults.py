"""Every fault that a rank of two can meet: who says what, with which exit code, and that nothing is lost by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scldm.train import checkpoint
from scldm.train.tracking import read_metrics
from tests.launch import faulty
from tests.launch.faulty import STEPS, Fault, Ranks, SmallConfig
from tests.scldm.train.small_runs import stored

pytestmark = pytest.mark.slow


def latest_step(run_dir: Path) -> int:
    target = checkpoint.pointed(run_dir / "checkpoints" / "latest")
    return 0 if target is None else int(target.name.removeprefix("step-"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    codes, outputs = ranks.run(faulty.train, SmallConfig(str(run_dir)), Fault())
    assert codes == [0, 0], outputs
    assert json.loads((run_dir / "outcome.json").read_text())["state"] == "finished"
    assert not (run_dir / "errors").exists()
    return run_dir


@pytest.fixture(scope="module")
def disturbed(ranks: Ranks, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The runs of all tests here; at the end all are resumed, in one start, and end at the undisturbed weights."""
    runs: list[Path] = []
    yield runs
    codes, outputs = ranks.run(faulty.resume, [str(run) for run in runs], timeout=300)
    assert codes == [0, 0], outputs
    for run in runs:
        assert_same_weights(run, undisturbed)


def assert_same_weights(run: Path, other: Path) -> None:
    (state, tensors), (expected, other_tensors) = stored(run), stored(other)
    assert state["step"] == STEPS, run
    assert state["n_updates"] == expected["n_updates"], run
    different = [key for key in tensors if not torch.equal(tensors[key], other_tensors[key])]
    assert not different, (run, different)
    losses = [{row["step"]: row["loss"] for row in read_metrics(where, "train")} for where in (run, other)]
    assert losses[0] == losses[1]


# kind, rank, steps, more of the train config; exit codes of both ranks; what each says; where the run then stands
FAULTS = {
    "a killed rank": (Fault("SIGKILL"), {}, (87, -9), ("rank 1 (*) is gone", ""), {5, 8}),
    "the first is killed": (Fault("SIGKILL", 0), {}, (-9, 87), ("", "rank 0 (*) is gone"), {5, 8}),
    "a rank that hangs": (
        Fault("hang"),
        {"hang_s": 5.0},
        (87, 87),
        ("rank 1 (*) hangs: it waits for the cells of step 9 since", "rank 1 (*) hangs"),
        {5, 8},
    ),
    "a frozen rank": (
        Fault("SIGSTOP"),
        {"hang_s": 5.0},
        (87, None),
        ("rank 1 (*) hangs: it does not answer; stacks of all ranks: ", ""),
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
        ("could not be written (rank 1: OSError: *", "the last whole checkpoint is step-0000000"),
        {5, 8},
    ),
    "SIGTERM": (Fault("SIGTERM", 0), {}, (85, 85), ("saved step *, asked by SIGTERM on rank 0", ""), {10, 11}),
    "SIGUSR1": (Fault("SIGUSR1", 1), {}, (85, 85), ("saved step *, asked by SIGUSR1 on rank 1", ""), {10, 11}),
    "the file stop": (Fault("stop"), {}, (86, 86), ("asked by the file *stop", ""), {10, 11, 12}),
    "a loss on one rank": (
        Fault("loss", 1, (9, 10, 11, 12)),
        {"max_skipped": 2},
        (2, 2),
        (
            "step 10: rank 1: loss nan on cells (source:row) 0:*; the step is skipped",
            "step 11: rank 1: loss nan on cells (source:row) 0:*; 3 steps in a row, train.max_skipped=2",
        ),
        {5, 8},
    ),
    "a gradient on one rank": (
        Fault("gradient", 1, (9,)),
        {"max_skipped": 0},
        (2, 2),
        ("step 9: rank 1: gradient of * on cells (source:row) 0:*", "step 9: rank 1: gradient of"),
        {5, 8},
    ),
}


def says(text: str, pattern: str) -> bool:
    at = 0
    for part in pattern.split("*"):
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_one_rank_ends_both_names_it_and_costs_nothing(
    name: str, ranks: Ranks, disturbed: list[Path], tmp_path: Path
) -> None:
    fault, more, codes, told, steps = FAULTS[name]
    config = SmallConfig(str(tmp_path / "run"))
    config = replace(config, train=replace(config.train, **more))
    found, outputs = ranks.run(faulty.train, config, fault, timeout=40)
    assert tuple(found) == codes, "\n".join(outputs)
    for output, pattern in zip(outputs, told, strict=True):
        assert says(output, pattern), output
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
    disturbed.append(tmp_path / "run")


def test_one_step_that_is_skipped_changes_nothing_else(ranks: Ranks, tmp_path: Path) -> None:
    """The moments too: both ranks follow a plain run whose step is skipped as well."""
    follow = SmallConfig(str(tmp_path / "two"))
    plain = replace(follow, run_dir=str(tmp_path / "one"), hardware=faulty.HardwareConfig("plain", 16))
    codes, outputs = ranks.run(faulty.train, follow, Fault("loss", 1, (6,)))
    assert codes == [0, 0], outputs
    codes, outputs = ranks.run(faulty.train, plain, Fault("loss", 0, (6,)), size=1)
    assert codes == [0], outputs
    (state, tensors), (expected, others) = stored(tmp_path / "two"), stored(tmp_path / "one")
    assert state["n_updates"] == expected["n_updates"] == STEPS - 1
    assert max(float((tensors[key] - others[key]).abs().max()) for key in tensors) < 2e-4


def test_a_file_save_saves_once_and_training_goes_on(ranks: Ranks, undisturbed: Path, tmp_path: Path) -> None:
    config = SmallConfig(str(tmp_path / "run"))
    config = replace(config, train=replace(config.train, keep=20))
    codes, outputs = ranks.run(faulty.train, config, Fault("save", 1, (1,)))
    assert codes == [0, 0], outputs
    assert outputs[0].count("asked by the file") == 1
    saved = {int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert len(saved - {5, 8, 10, 15, 16}) <= 1
    assert not (tmp_path / "run" / "save").exists()
    assert_same_weights(tmp_path / "run", undisturbed)


def test_what_the_first_rank_refuses_ends_all(ranks: Ranks, undisturbed: Path) -> None:
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file() and path.name != "lock"}
    config = SmallConfig(str(undisturbed), optim=replace(faulty.OPTIM, lr=1e-2))
    codes, outputs = ranks.run(faulty.train, config, Fault())
    assert codes == [2, 2], outputs
    assert "holds another run: optim.lr was 0.003, now 0.01" in outputs[0]
    assert says(outputs[1], "rank 1 stops: rank 0 (*) refuses: *holds another run"), outputs[1]
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.name in ("config.json", "latest")} == {
        path: data for path, data in before.items() if path.name in ("config.json", "latest")
    }


def test_the_plain_engine_on_two_ranks_is_refused_before_a_folder_is_made(ranks: Ranks, tmp_path: Path) -> None:
    config = SmallConfig(str(tmp_path / "run"), hardware=faulty.HardwareConfig("plain", 8))
    codes, outputs = ranks.run(faulty.train, config, Fault())
    assert codes == [2, 2]
    assert all("hardware.engine=plain runs on one rank, not on 2" in output for output in outputs)
    assert not (tmp_path / "run").exists()


def test_a_damaged_part_of_one_rank_is_passed_over_by_both(
    ranks: Ranks, undisturbed: Path, disturbed: list[Path], tmp_path: Path
) -> None:
    config = SmallConfig(str(tmp_path / "run"))
    codes, outputs = ranks.run(faulty.train, config, Fault("stop", 1, (10,)))
    assert codes == [86, 86], outputs
    newest = checkpoint.pointed(tmp_path / "run" / "checkpoints" / "latest")
    assert newest is not None
    part = newest / "part-1-of-2.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    codes, outputs = ranks.run(faulty.train, config, Fault())
    assert codes == [0, 0], outputs
    assert f"{newest.name} is passed over: {part} is damaged" in outputs[0]
    assert_same_weights(tmp_path / "run", undisturbed)
