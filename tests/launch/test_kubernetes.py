"""The Job of docs/kubernetes.md: what it starts is accepted, and its script ends with the run's own exit code."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from launch import train_vae
from launch.cli import config_of

PAGE = Path(__file__).parents[2] / "docs" / "kubernetes.md"


def job() -> tuple[dict[str, Any], dict[str, Any]]:
    """Its spec, and its container."""
    service, found = yaml.safe_load_all(PAGE.read_text().split("```yaml\n")[1].split("```")[0])
    assert service["metadata"]["name"] == found["spec"]["template"]["spec"]["subdomain"]
    (container,) = found["spec"]["template"]["spec"]["containers"]
    return found["spec"], container


def script() -> str:
    return job()[1]["args"][0]


def test_torchrun_and_scldm_accept_the_command() -> None:
    spec, container = job()
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(given["NODES"]) == spec["completions"] == spec["parallelism"]
    _, text = script().partition(" &\n")[0].replace("\\\n", " ").split("\n")
    for name, value in {**given, "JOB_COMPLETION_INDEX": "3"}.items():
        text = text.replace(f'"${name}"', value)
    program, *words = shlex.split(text)
    told = get_args_parser().parse_args(words)
    assert (program, told.node_rank, told.training_script) == ("torchrun", 3, "scldm")
    assert int(told.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    verb, config = told.training_script_args[:2], config_of(train_vae, told.training_script_args[2:])
    assert (verb, config.run_dir) == (["train", "vae"], given["RUN"])
    n_ranks = int(given["NODES"]) * int(told.nproc_per_node)
    assert config.hardware.accumulation(config.train.global_batch, n_ranks) >= 1


def start(folder: Path, torchrun: str) -> subprocess.Popen[bytes]:
    """The script, with a stand-in for torchrun."""
    (folder / "torchrun").write_text(f"#!/bin/bash\n{torchrun}\n")
    (folder / "torchrun").chmod(0o755)
    env = {"RUN": str(folder), "NODES": "4", "JOB_COMPLETION_INDEX": "0", "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", "-c", script()], env=os.environ | env, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "ends, expected",
    [
        ("exit 0", 0),
        ("""echo '{"exit_code": 86}' >"$RUN/outcome.json"; exit 1""", 86),
        ("""echo '{"exit_code": null}' >"$RUN/outcome.json"; exit 1""", 87),
        ("exit 1", 87),
    ],
)
def test_the_script_ends_with_the_code_of_the_run(ends: str, expected: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "outcome.json").write_text('{"exit_code": 2}')  # of an earlier start
    assert start(run, ends).wait(60) == expected


def test_a_signal_reaches_torchrun(tmp_path: Path) -> None:
    tmp_path /= "run"
    tmp_path.mkdir()
    saves = """trap 'sleep 0.5; echo "{\\"exit_code\\": 85}" >"$RUN/outcome.json"; exit 1' TERM
touch "$RUN/up"; while true; do sleep 0.1; done"""
    process = start(tmp_path, saves)
    until = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 85
