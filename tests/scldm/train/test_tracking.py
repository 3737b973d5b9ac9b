"""Tracking: the file first, MLflow behind it, and no failure that reaches training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from scldm.train import tracking
from scldm.train.tracking import Tracker, TrackingConfig, read_metrics

OFF = TrackingConfig(enabled=False)


def test_rows_are_in_the_file_at_once_and_a_torn_row_is_dropped_on_resume(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, OFF)
    tracker.log(1, {"loss": 2.5, "bad": float("nan")}, cells_seen=128)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())  # before any close
    assert row == {"step": 1, "cells_seen": 128, "time": row["time"], "split": "train", "loss": 2.5, "bad": None}
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # killed while writing
    with Tracker(tmp_path, OFF) as tracker:
        tracker.log(1, {"loss": 2.0})  # the resumed run repeats a step
        tracker.log(2, {"loss": 1.5})
        tracker.log(2, {"nll": 7.0}, split="validation")
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path, "train")] == [(1, 2.0), (2, 1.5)]
    assert [r["nll"] for r in read_metrics(tmp_path, "validation")] == [7.0]
    assert len(read_metrics(tmp_path)) == 3


def test_lines_that_are_no_rows_are_passed_over_and_the_rows_around_them_are_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from mlflow import MlflowClient

    with Tracker(tmp_path, OFF) as tracker:
        tracker.log(1, {"loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:  # as a machine that went down leaves them
        file.write(b"\0" * 40 + b"\n" + b'{"step": 2, "lo{"step": 3}\n' + b"7\n" + b'{"step": 2, "loss": 1.0}\n\xff\n')
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with Tracker(tmp_path, TrackingConfig(uri=uri)) as tracker:
        tracker.log(3, {"loss": 1.0})
        run_id = tracker.run_id()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
    assert [m.step for m in MlflowClient(uri).get_metric_history(run_id, "train/loss")] == [1, 3]
    assert capsys.readouterr().err.count("has lines that are no rows") == 1


def test_the_last_rows_of_a_run_that_was_stopped_are_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whoever stopped it kills what has not ended half a minute later, and the exit code with it
    monkeypatch.setattr(tracking, "HURRY_S", 0.2)
    waits: list[float | None] = []
    monkeypatch.setattr(tracking._Forwarder, "run", lambda self: self.closing.wait(60))
    monkeypatch.setattr(tracking._Forwarder, "join", lambda self, timeout=None: waits.append(timeout))
    for status in ("FINISHED", "FAILED", "KILLED"):
        Tracker(tmp_path, TrackingConfig(close_s=9.0)).close(status)
    assert waits == [9.0, 0.2, 0.2]


def test_a_rank_that_is_not_active_writes_nothing(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", TrackingConfig(), active=False, params={"a": 1}) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.log_artifact(tmp_path / "none")
        assert tracker.run_id() == ""
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_no_half_row_and_does_not_raise(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tracker = Tracker(tmp_path, OFF)
    tracker.log(1, {"loss": 1.0})
    file = tracker._file
    assert file is not None

    class HalfFull:
        def __getattr__(self, name: str):
            return getattr(file, name)

        def write(self, data: bytes) -> int:
            return file.write(data[:10])

    tracker._file = HalfFull()  # type: ignore[assignment]
    tracker.log(2, {"loss": 2.0})
    tracker.log(3, {"loss": 3.0})
    tracker._file = file
    tracker.log(4, {"loss": 4.0})
    tracker.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 4]
    assert capsys.readouterr().err.count("writing") == 1


def test_a_server_that_is_not_there_costs_no_time_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = TrackingConfig(uri=f"http://user:secret@127.0.0.1:{free_port()}", every_s=0.05, close_s=20.0)
    start = time.monotonic()
    tracker = Tracker(tmp_path, cfg)
    for step in range(200):
        tracker.log(step, {"loss": 1.0})
    assert time.monotonic() - start < 2.0
    assert tracker.run_id() == ""
    tracker.close()
    assert time.monotonic() - start < 30.0
    assert len(read_metrics(tmp_path)) == 200
    said = capsys.readouterr().err
    assert said.count(" failed (") == 1
    assert said.count("not everything reached") == 1
    assert "secret" not in said


def test_sqlite_runs_are_nested_and_a_resume_goes_on_in_the_same_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    figure = tmp_path / "figure.txt"
    figure.write_text("here")
    parent = Tracker(tmp_path, TrackingConfig(uri=uri), stage="quickstart")
    parent_id = parent.run_id()
    cfg = TrackingConfig(uri=uri, parent_run_id=parent_id, every_s=0.1)
    with Tracker(tmp_path / "vae", cfg, stage="train vae", params={"ranks": 2, "optim": {"lr": 0.1}}) as tracker:
        tracker.log(1, {"loss": 3.0, "odd name %": 1.0, "inf": float("inf")}, cells_seen=64)
        tracker.log_artifact(figure, "figures")
        first_id = tracker.run_id()
    client = MlflowClient(uri)
    with Tracker(tmp_path / "vae", cfg, params={"ranks": 4, "new": 1}) as tracker:
        tracker.log(2, {"loss": 2.0}, cells_seen=128)
        assert tracker.run_id() == first_id
        assert client.get_run(first_id).info.status == "RUNNING"
        tracker.close("KILLED")
    parent.close()

    run = client.get_run(first_id)
    assert run.info.status == "KILLED"
    assert run.info.run_name == "train vae"
    assert run.data.tags["mlflow.parentRunId"] == parent_id
    assert client.get_run(parent_id).info.status == "FINISHED"
    assert run.data.params == {"ranks": "2", "optim.lr": "0.1", "new": "1"}
    assert run.data.tags["resumed.ranks"] == "4"
    assert [(m.step, m.value) for m in client.get_metric_history(first_id, "train/loss")] == [(1, 3.0), (2, 2.0)]
    assert "train/odd name _" in run.data.metrics
    assert [a.path for a in client.list_artifacts(first_id, "figures")] == ["figures/figure.txt"]
    assert list((tmp_path / "mlflow_artifacts").rglob("figure.txt"))

    # what was noted as sent is not sent again
    state_file = tmp_path / "vae" / "mlflow_run.json"
    with Tracker(tmp_path / "vae", OFF) as tracker:
        tracker.log(3, {"loss": 1.0})
    state = json.loads(state_file.read_text()) | {"sent_bytes": (tmp_path / "vae" / "metrics.jsonl").stat().st_size}
    state_file.write_text(json.dumps(state))
    with Tracker(tmp_path / "vae", cfg) as tracker:
        assert tracker.run_id() == first_id
    assert len(client.get_metric_history(first_id, "train/loss")) == 2

    # the store no longer has the run: a new one there, with every row
    state_file.write_text(json.dumps(state | {"run_id": "0" * 32}))
    with Tracker(tmp_path / "vae", cfg) as tracker:
        second_id = tracker.run_id()
    assert second_id not in ("", first_id)
    assert len(client.get_metric_history(second_id, "train/loss")) == 3


CUT = """
import os, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from scldm.train.tracking import Tracker, TrackingConfig

made = 0

@event.listens_for(Engine, "before_cursor_execute")
def cut(connection, cursor, statement, *_):
    global made
    made += "CREATE TABLE" in statement
    if made == 40:
        os._exit(85)

tracker = Tracker(Path(sys.argv[1]), TrackingConfig())
tracker.log(1, {"loss": 2.0})
tracker.run_id()
"""


def test_a_run_that_was_stopped_while_mlflow_made_its_tables_goes_on_there(tmp_path: Path) -> None:
    """Of which it needs a second, or on a busy file system many."""
    from mlflow import MlflowClient

    done = subprocess.run([sys.executable, "-c", CUT, tmp_path], capture_output=True, text=True, timeout=100)
    assert done.returncode == 85, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    with Tracker(tmp_path, TrackingConfig()) as tracker:
        tracker.log(2, {"loss": 1.0})
        run_id = tracker.run_id()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == [1, 2]
    assert not list(tmp_path.glob(".*"))


def test_an_exception_leaves_the_run_failed_and_an_interrupt_killed(tmp_path: Path, monkeypatch) -> None:
    statuses: list[str] = []
    monkeypatch.setattr(Tracker, "close", lambda self, status="FINISHED": statuses.append(status))
    for error in (None, ValueError(), KeyboardInterrupt(), SystemExit(85)):
        tracker = Tracker(tmp_path, OFF, active=False)
        tracker.__exit__(type(error) if error else None, error, None)
    assert statuses == ["FINISHED", "FAILED", "KILLED", "KILLED"]


def test_importing_it_does_not_import_mlflow() -> None:
    code = "import sys, scldm.train.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_what_a_killed_server_missed_is_there_once_after_it_is_back(tmp_path: Path, capsys) -> None:
    from mlflow import MlflowClient

    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    server = start_server(tmp_path, port)
    try:
        tracker = Tracker(tmp_path / "run", TrackingConfig(uri=uri, every_s=0.2, close_s=60.0), params={"a": 1})
        run_id = tracker.run_id()
        assert run_id
        for step in range(300):
            tracker.log(step, {"loss": step / 2, "lr": 0.1})
            if step == 100:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
            if step > 100:
                time.sleep(0.02)  # rows go on while the server is away
        server = start_server(tmp_path, port)
        tracker.close()
        client = MlflowClient(uri)
        history = client.get_metric_history(run_id, "train/loss")
        assert sorted((m.step, m.value) for m in history) == [(s, s / 2) for s in range(300)]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert capsys.readouterr().err.count(" failed (") == 1

        # killed between sending and noting how far: the rows are sent again and stay one
        state = json.loads((tmp_path / "run" / "mlflow_run.json").read_text())
        (tmp_path / "run" / "mlflow_run.json").write_text(json.dumps(state | {"sent_bytes": 0}))
        with Tracker(tmp_path / "run", TrackingConfig(uri=uri)) as tracker:
            tracker.log(300, {"loss": 150.0})
        assert len(client.get_metric_history(run_id, "train/loss")) == 301
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def start_server(folder: Path, port: int) -> subprocess.Popen:
    """A real MLflow server on the loopback, answering; the database in the folder outlives it."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination",
        str(folder / "a"),
    ]
    alone = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # else eight more processes
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=alone, start_new_session=True)
    for _ in range(120):
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return server
        except OSError:
            assert server.poll() is None, (folder / "server.log").read_text()
    raise TimeoutError((folder / "server.log").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("name", ["plain", "a b", "a?x=1", "pct%20x", "100%", "a#b"])
def test_a_run_folders_name_is_no_part_of_a_uri(name: str, tmp_path: Path) -> None:
    from sqlalchemy import make_url

    database = tmp_path / name / "mlflow.db"
    uri = tracking.database_uri(database)
    assert make_url(uri).database == str(database)
    assert tracking._database_of(uri) == database
