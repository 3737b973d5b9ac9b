"""Importing the library and training need neither DeepSpeed, MLflow nor TileDB-SOMA, under Python 3.12 as well."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_pipeline.small_sets import known_cells, write_set
from tests.packages import hide

ROOT = Path(__file__).resolve().parent.parent
UNWANTED = ("deepspeed", "mlflow", "tiledbsoma")
IMPORTS = f"""
import importlib, importlib.util, pkgutil, platform
print([name for name in {UNWANTED} if importlib.util.find_spec(name)])
import scldm
for module in pkgutil.walk_packages(scldm.__path__, "scldm."):
    # these need packages of the extras `evaluate` and `test`, or know DeepSpeed
    if not module.name.startswith(("scldm.comparison", "scldm.evaluate", "scldm.kernels.")):
        importlib.import_module(module.name)
import torch
print(platform.python_version(), torch.__version__)
"""
STEPS = ["train.steps=3", "train.global_batch=10", "train.validate_every=3", "train.save_every=3", "train.log_every=1"]
RUN = ["hardware.engine=plain", "hardware.micro_batch=10", "tracking.enabled=false", "model.width=16", *STEPS]


def check(python: str, folder: Path, environment: dict[str, str]) -> list[str]:
    """Import everything and train three steps; returns what the imports printed."""
    write_set(folder / "shards", known_cells(n_train=32, n_validation=8, n_genes=60))

    def run(*words: str) -> str:
        done = subprocess.run(
            [python, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=850
        )
        assert done.returncode == 0, done.stderr[-3_000:]
        return done.stdout

    printed = run("-c", IMPORTS).splitlines()
    assert printed[0] == "[]"
    run("-m", "launch.cli", "train", "vae", "vae/tiny", "hardware/cpu", "data.shards=shards", "run_dir=run", *RUN)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} >= {1, 2, 3}
    assert json.loads((folder / "run" / "outcome.json").read_text())["state"] == "finished"
    return printed


@pytest.mark.slow
def test_training_without_deepspeed_mlflow_and_tiledbsoma(tmp_path: Path) -> None:
    """As if they were not installed, under this Python."""
    path = os.pathsep.join([hide(tmp_path / "site", hidden=UNWANTED), str(ROOT)])
    check(sys.executable, tmp_path, os.environ | {"PYTHONPATH": path})


def python_3_12() -> str | None:
    """One that starts: a shim may stand for a version that is not there."""
    pyenv = sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"))
    for candidate in (shutil.which("python3.12"), *map(str, pyenv)):
        if candidate and subprocess.run([candidate, "-c", "import venv"], capture_output=True).returncode == 0:
            return candidate
    return None


@pytest.mark.exhaustive  # installs torch: minutes, and 6 GB where the index has it for CUDA alone
@pytest.mark.timeout(3_600)
def test_training_under_python_3_12_with_the_pinned_torch(tmp_path: Path) -> None:
    """In an environment of its own, with the extra `shards` alone."""
    python = python_3_12()
    if python is None:
        pytest.skip("needs a python3.12 on the PATH or of pyenv, with the module venv")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    own = str(tmp_path / "venv" / "bin" / "python")
    pip = [own, "-m", "pip", "install", "--quiet", "--no-compile", "--no-cache-dir", "-c", "constraints.txt"]
    subprocess.run([*pip, f"{ROOT}[shards]"], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    printed = check(own, tmp_path / "work", environment)
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert re.fullmatch(rf"3\.12\.\d+ {re.escape(pinned[1])}(\+\w+)?", printed[1])
