"""Importing the library and training need neither DeepSpeed, MLflow nor TileDB-SOMA, under Python 3.12 as well."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch import cli
from launch.verbs import VERBS
from tests.data_pipeline.small_sets import known_cells, write_set
from tests.packages import hide

ROOT = Path(__file__).resolve().parent.parent
UNWANTED = ("deepspeed", "mlflow", "tensorboard", "tiledbsoma")
IMPORTS = f"""
import importlib, importlib.util, pkgutil, platform
print([name for name in {UNWANTED} if importlib.util.find_spec(name)])
import scldm
for module in pkgutil.walk_packages(scldm.__path__, "scldm."):
    # these need packages of the extras `evaluate` and `test`, or know DeepSpeed or TensorBoard
    if not module.name.startswith(("scldm.comparison", "scldm.evaluate", "scldm.kernels.", "scldm.train.tensorboard")):
        importlib.import_module(module.name)
import torch
print(platform.python_version(), torch.__version__)
"""
STEPS = ["train.steps=3", "train.global_batch=10", "train.validate_every=3", "train.save_every=3", "train.log_every=1"]
RUN = ["data.shards=shards", "tracking.enabled=false", "model.width=16", *STEPS]
ALONE = ["hardware.engine=plain", "hardware.micro_batch=10", "run_dir=run"]
ON_TWO = ["hardware.engine=fsdp", "hardware.micro_batch=5", "run_dir=on-two"]


def check(python: str, folder: Path, environment: dict[str, str]) -> list[str]:
    """Import everything, train three steps alone and three on two ranks; returns what the imports printed."""
    write_set(folder / "shards", known_cells(n_train=32, n_validation=8, n_genes=60))

    def run(*words: str) -> str:
        done = subprocess.run(
            [python, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=850
        )
        assert done.returncode == 0, done.stderr[-3_000:]
        return done.stdout

    printed = run("-c", IMPORTS).splitlines()
    assert printed[0] == "[]"
    train = ["-m", "launch.cli", "train", "vae", "vae/tiny", "hardware/cpu", *RUN]
    run(*train, *ALONE)
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *train, *ON_TWO)
    losses = []
    for name in ("run", "on-two"):
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert {row["step"] for row in rows} >= {1, 2, 3}
        assert json.loads((folder / name / "outcome.json").read_text())["state"] == "finished"
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    return printed


@pytest.mark.slow
def test_training_without_deepspeed_mlflow_and_tiledbsoma(tmp_path: Path) -> None:
    """As if they were not installed, under this Python."""
    path = os.pathsep.join([hide(tmp_path / "site", hidden=UNWANTED), str(ROOT)])
    check(sys.executable, tmp_path, os.environ | {"PYTHONPATH": path})


MODULES = {"scikit-learn": "sklearn", "pot": "ot", "umap-learn": "umap", "scikit-misc": "skmisc"}
# extra -> the verbs and rooms that run with it and nothing else; "" is scldm alone
CLAIMS = {
    "": [
        *("generate", "transform", "embed", "reconstruct", "submit", "status", "logs", "shards info", "completion"),
        *("checkpoint inspect", "checkpoint verify", "checkpoint convert"),
    ],
    "mlflow": ["track replay"],
    "shards": ["train vae", "encode", "train ldm", "plan", "export"],
    "data": ["soma write", "shards write", "shards verify"],
    "evaluate": ["evaluate", "report", "launch.evaluation", "scldm.evaluate"],
    "data,train,evaluate": ["quickstart"],
}
IMPORT = """
import importlib, pkgutil
for name in {names}:
    module = importlib.import_module(name)
    for inner in pkgutil.iter_modules(getattr(module, "__path__", []), name + "."):
        if not inner.name.endswith(".cell_eval"):  # an extra of its own
            importlib.import_module(inner.name)
"""


def brought(extra: str) -> set[str]:
    """The modules that an extra brings, with those of the extras that it names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = set[str]()
    for requirement in extras[extra]:
        name = re.split(r"[^\w.-]", requirement)[0].lower()
        inner = re.findall(r"\[(.+)\]", requirement) if name == "scldm" else []
        found |= brought_by(inner[0]) if inner else {MODULES.get(name, name.replace("-", "_"))}
    return found


def brought_by(extras: str) -> set[str]:
    return set().union(*(brought(extra) for extra in extras.split(",") if extra))


@pytest.mark.slow
@pytest.mark.parametrize("extra", CLAIMS)
def test_each_verb_needs_the_extra_that_claims_it_and_no_other(extra: str, tmp_path: Path) -> None:
    hidden = brought_by("all") - brought_by(extra) - {"fsspec"}  # torch brings that
    names = [VERBS[verb][0] if verb in VERBS else verb for verb in CLAIMS[extra]]
    path = os.pathsep.join([hide(tmp_path, hidden=hidden), str(ROOT)])
    words = [sys.executable, "-c", IMPORT.format(names=names)]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]


FIT = """
import scldm
from tests.scldm.test_fitting import FAST, FEW, cells
scldm.fit(cells(), ["treatment"], vae=FEW, ldm=FEW).save("model")
print(scldm.load("model").generate({"treatment": "stim"}, n=3, sampler=FAST).shape)
"""


@pytest.mark.slow
@pytest.mark.parametrize("extra, said", [("", "scldm's extra 'shards' brings it"), ("shards", "")])
def test_fit_needs_the_one_extra_that_its_error_names(extra: str, said: str, tmp_path: Path) -> None:
    hidden = brought_by("all") - brought_by(extra) - {"fsspec"}
    path = os.pathsep.join([hide(tmp_path / "site", hidden=hidden), str(ROOT)])
    words, environment = [sys.executable, "-c", FIT], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, said in done.stderr) == ("" if said else "(3, 40)\n", True), done.stderr[-2_000:]


def test_every_verb_is_claimed() -> None:
    assert sorted(v for verbs in CLAIMS.values() for v in verbs if v in VERBS) == sorted(VERBS)


@pytest.mark.parametrize(
    "package, said",
    [
        ("tiledbsoma", """the package tiledbsoma is missing. scldm's extra 'data' brings it: pip install -c """
         """constraints.txt -e ".[data]", in scldm's folder"""),
        ("sklearn", "scldm's extra 'evaluate' brings it"),
        ("numba", "scldm's extra 'shards' brings it"),
        ("anndata", "scldm needs it: pip install -c constraints.txt -e ., in"),
        ("nobody_has_it", "pip install nobody-has-it may bring it"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_what_brings_it(package, said, capsys, monkeypatch) -> None:
    def gone(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("importlib.import_module", gone)
    assert cli.main(["embed", f"model={ROOT}", f"h5ad={__file__}", "out=out.h5ad"]) == 2
    assert said in capsys.readouterr().err


def python_3_12() -> str | None:
    """One that starts: a shim may stand for a version that is not there."""
    pyenv = sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"))
    for candidate in (shutil.which("python3.12"), *map(str, pyenv)):
        if candidate and subprocess.run([candidate, "-c", "import venv"], capture_output=True).returncode == 0:
            return candidate
    return None


# extra -> command lines of the verbs that it claims, on what the other extras' verbs made of small cells
CALLS = {
    "mlflow": ["track replay {made}/vae"],
    "data": ["shards write source.paths={made}/cells.h5ad out=s", "shards verify path=s", "shards info path=s"],
    "": ["status {made}/vae", "checkpoint verify at={made}/vae", "checkpoint inspect at={made}/vae"],
    "shards": ["export vae={made}/vae out=model", "encode vae={made}/vae shards={made}/shards out=latents"],
    "evaluate": ["report {made}/vae out=r.html"],
    "data,train,evaluate": ["quickstart --help"],
}


@pytest.mark.exhaustive  # installs torch for each extra
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("extra", CLAIMS)
def test_each_verb_runs_in_an_environment_with_its_extra_alone(extra: str, tmp_path: Path) -> None:
    """Nothing is hidden: the packages of other extras are not there."""
    from launch.cli import main
    from tests.launch.small_verbs import VAE, write_cells

    made = tmp_path / "made"
    made.mkdir()
    write_cells(made / "cells.h5ad")
    words = ["shards", "write", f"source.paths={made}/cells.h5ad", f"out={made}/shards", "conditions=type"]
    assert main([*words, "block_cells=32", "shard_cells=128", "split.validation=0.2"]) == 0
    followed = f"tracking.enabled={str(extra == 'mlflow').lower()}"
    assert main(["train", "vae", f"data.shards={made}/shards", f"run_dir={made}/vae", *VAE, followed]) == 0
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    own = str(tmp_path / "venv" / "bin" / "python")
    pip = [own, "-m", "pip", "install", "--quiet", "--no-compile", "--no-cache-dir", "-c", "constraints.txt"]
    subprocess.run([*pip, f"{ROOT}[{extra}]" if extra else str(ROOT)], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    helps = [f"{verb} --help" for verb in CLAIMS[extra] if verb in VERBS]
    for line in [*helps, *CALLS[extra]]:
        words = [own, "-P", "-m", "launch.cli", *line.format(made=made).split()]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr[-2_000:])


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
