"""Samples of each node: who takes them, where they go, and that no failure of theirs reaches training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.followed import followed
from scldm.train import machine
from scldm.train.follower import row_files
from scldm.train.machine import Machine, Place, place_from_environment, place_of
from scldm.train.tracked import unsent
from scldm.train.tracking import Tracker, TrackingConfig
from tests.data_pipeline.small_sets import known_cells, write_set

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "FIRST_S", 0.05)


def rows_of(path: Path, n: int = 1) -> list[dict[str, Any]]:
    """The rows of a file, once it has so many."""
    end = time.monotonic() + 30
    while not path.is_file() or path.read_bytes().count(b"\n") < n:
        assert time.monotonic() < end
        time.sleep(0.02)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_rank_of_each_node_takes_its_samples_and_many_nodes_take_fewer() -> None:
    assert [place_of(["a", "a"], rank) for rank in (0, 1)] == [Place("", 1, True), Place("", 1, False)]
    found = [place_of(["b", "a", "b", "a"], rank) for rank in range(4)]
    assert found == [Place("b", 2, True), Place("a", 2, True), Place("b", 2, False), Place("a", 2, False)]
    assert [Place("a", n).every_s(10.0) for n in (1, 10, 1_000)] == [10.0, 10.0, 1_000.0]


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, Place()),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Place("", 1, False)),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Place("here", 2, True)),
        ({"SLURM_STEP_NUM_NODES": "3", "SLURM_LOCALID": "1"}, Place("here", 3, False)),
        ({"SLURM_STEP_NUM_NODES": "3(x2)", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "0"}, Place()),
    ],
)
def test_a_process_that_meets_no_other_knows_its_place(monkeypatch: pytest.MonkeyPatch, environment, place) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_NODES", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine.socket, "gethostname", lambda: "here")
    assert place_from_environment() == place


@pytest.mark.parametrize("local", ["0", "1"])
def test_a_verb_on_many_nodes_has_samples_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: str) -> None:
    @dataclass
    class Config:
        out: str = "latents"

    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": local}
    for name, value in {**ranks, "SCLDM_PARENT": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "tracking" / "encode" / "system" / f"{machine.socket.gethostname()}.jsonl"
    with followed("encode", Config()):
        if local == "0":
            assert rows_of(path)[0]["split"] == f"system/{path.stem}"
        else:
            time.sleep(0.2)
            assert not path.exists()


@pytest.mark.heavy
def test_a_run_on_one_node_has_names_without_it_and_one_on_two_has_both_in_one_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    cfg = TrackingConfig(system_s=0.05, every_s=0.1)
    places = [place_of(["one", "two", "two"], rank) for rank in range(3)]
    for run, of in (("alone", [Place()]), ("both", places)):
        ranks = [Tracker(tmp_path / run, cfg, active=k == 0, place=place) for k, place in enumerate(of)]
        for tracker in ranks:
            tracker.log(7, {"loss": 1.0})
        files = row_files(tmp_path / run) if run == "alone" else ["", "system.jsonl", "system/two.jsonl"]
        for name in files[1:]:
            rows = rows_of(tmp_path / run / name, 3)
            assert rows[-1]["step"] == 7
            assert 0 <= rows[-1]["cpu_utilization_percentage"] <= 100
        for tracker in reversed(ranks):  # the first one last
            tracker.close()
        assert unsent(tmp_path / run) == []
        assert row_files(tmp_path / run) == ["metrics.jsonl", *files[1:]]
    keys = {}
    for run in ("alone", "both"):
        client = MlflowClient(f"sqlite:///{tmp_path / run / 'mlflow.db'}")
        (found,) = client.search_runs(["1"])
        keys[run] = {key for key in found.data.metrics if key.startswith("system/")}
    used = "cpu_utilization_percentage"
    assert f"system/{used}" in keys["alone"]
    assert keys["both"] == {key.replace("/", f"/{node}/") for key in keys["alone"] for node in ("one", "two")}


def test_a_sampler_that_fails_is_one_line_and_one_that_hangs_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked, hung = threading.Event(), threading.Event()

    def fail(self: Machine) -> dict[str, float]:
        if asked.is_set():
            return {"cpu_utilization_percentage": 1.0}
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(Machine, "sample", fail)
    tracker = Tracker(tmp_path, TrackingConfig(system_s=0.02), active=False, place=Place("two", 2))
    time.sleep(0.3)
    asked.set()
    assert rows_of(tmp_path / "system/two.jsonl"), "it goes on"
    tracker.close()
    assert capsys.readouterr().err.count("two.jsonl lacks samples of the machine (the driver is gone)") == 1

    asked.clear()
    monkeypatch.setattr(Machine, "sample", lambda self: (asked.set(), hung.wait())[0])
    tracker = Tracker(tmp_path, TrackingConfig(system_s=0.02), active=False, place=Place("two", 2))
    assert asked.wait(10)
    start = time.monotonic()
    tracker.close()
    assert time.monotonic() - start < 10, "it is not waited for"
    hung.set()


def test_a_node_of_which_nothing_can_be_measured_is_one_line_and_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    sampler = machine.Sampler(tmp_path, Place(), 0.05, is_first=True)
    sampler.start()
    sampler.join(10)
    assert not sampler.is_alive()
    assert "the machine is not sampled: that needs `pip install psutil`" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_gpu_has_mlflows_names_and_units_and_may_tell_no_power(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def watts(gpu: int) -> int:
        if gpu == 1:
            raise NVMLError
        return 350_000

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda k: k,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=20e9, total=80e9),
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=60 + gpu),
        nvmlDeviceGetPowerUsage=watts,
        nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    of_gpus = {name: value for name, value in Machine().sample().items() if name.startswith("gpu_")}
    assert of_gpus == {
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_memory_usage_megabytes": 20_000.0,
        "gpu_0_utilization_percentage": 60,
        "gpu_0_power_usage_watts": 350.0,
        "gpu_0_power_usage_percentage": 50.0,
        "gpu_1_memory_usage_percentage": 25.0,
        "gpu_1_memory_usage_megabytes": 20_000.0,
        "gpu_1_utilization_percentage": 61,
    }


def test_names_are_those_of_mlflows_monitors(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor

    monkeypatch.setitem(sys.modules, "pynvml", None)
    theirs = set()
    for monitor in (CPUMonitor(), DiskMonitor()):
        monitor.collect_metrics()
        theirs |= monitor.aggregate_metrics().keys()
    assert Machine().sample().keys() == theirs


@pytest.mark.slow
def test_two_nodes_under_torchrun_are_in_one_run_and_in_tensorboard(tmp_path: Path) -> None:
    """On a real run of two ranks; in a second start the sampler of the second node fails."""
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore[reportMissingImports]

    write_set(tmp_path / "shards", known_cells(n_train=64, n_validation=8, n_genes=60))
    run, said = tmp_path / "run", list[str]()
    for steps, failing in ((25, ""), (40, "1")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "tests.launch.two_nodes", failing, "train", "vae", "vae/tiny", "hardware/cpu"]
        command += ["train.global_batch=20", "hardware.micro_batch=10", f"train.steps={steps}", "train.log_every=5"]
        command += ["hardware.engine=fsdp", "allow_changes=train", "gate=false", f"data.shards={tmp_path}/shards"]
        command += [f"run_dir={run}", "tracking.system_s=0.2", "tracking.close_s=60"]
        command += ["tracking.also=scldm.train.tensorboard:TensorBoard"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3_000:]
        said.append(done.stderr)
    lacks = "system/node1.jsonl lacks samples of the machine (the driver is gone)"
    assert [text.count(lacks) for text in said] == [0, 1]
    rows = rows_of(run / "system/node1.jsonl")
    assert {row["split"] for row in rows} == {"system/node1"}
    assert max(row["step"] for row in rows) >= 5

    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    (found,) = client.search_runs(["1"])
    assert (found.info.status, found.data.tags["hosts"]) == ("FINISHED", "node0,node1")
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for node, path in (("node0", "system.jsonl"), ("node1", "system/node1.jsonl")):
        name, n = f"system/{node}/cpu_utilization_percentage", len(rows_of(run / path))
        assert len(client.get_metric_history(found.info.run_id, name)) == n >= 1
        assert name in board.Tags()["scalars"]
    assert "system/cpu_utilization_percentage" not in found.data.metrics
