"""What every test starts from: one thread, seeded generators, and no tracking server or job from around it."""

from __future__ import annotations

import os
import random
import sys
from typing import Any

# before numpy and torch are imported anywhere: with more threads a suite of 36 s took 124 s on two cores
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[variable] = os.environ.get("SCLDM_TEST_THREADS", "1")  # tests/run.sh --as
os.environ["MPLBACKEND"] = "Agg"
# children take no module from their current folder (python -P): this checkout is theirs, whichever is installed
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (ROOT, os.environ.get("PYTHONPATH")) if p)
# tests run ranks and read figures as on a machine without GPUs: those that there are are hidden, from processes too;
# SCLDM_TEST_GPU=1 is for the tests of kernels and attention alone, which then run on one
if os.environ.get("SCLDM_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton asks when it is first imported, as by torch
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
for variable in [name for name in os.environ if name.startswith(("SLURM_", "MLFLOW_TRACKING_", "MLFLOW_EXPERIMENT_"))]:
    del os.environ[variable]
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for variable in PLACE:
    os.environ.pop(variable, None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# the same examples in every run, and no deadline that a busy machine misses
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


LONGEST = ("tests/slurm/", "tests/launch/test_quickstart.py", "tests/scldm/parallel/test_engine.py")  # minutes each


# a verdict of these depends on how sums are rounded, which differs from one processor to the next: tests/run.sh --as
NUMERICAL = (
    *("tests/scldm/model/", "tests/scldm/flow/", "tests/scldm/kernels/", "tests/scldm/evaluate/"),
    *("tests/scldm/test_count_", "tests/scldm/test_draws.py", "tests/scldm/test_fitting.py", "tests/scldm/test_li"),
    *("tests/scldm/test_pretrained", "tests/scldm/test_python_api.py"),
    *(f"tests/scldm/train/test_{name}.py" for name in ("golden", "learning", "losses", "ema", "optim", "resume")),
    *("tests/scldm/parallel/test_engine.py", "tests/launch/test_evaluate.py", "tests/launch/test_evaluate_vae.py"),
    *(f"tests/launch/test_{name}.py" for name in ("generate", "reconstruct", "train_ldm", "encode", "faults", "verbs")),
    *(f"tests/launch/test_{name}.py" for name in ("reconstructed_cells", "sight", "gate", "evaluate_embedding")),
    *(
        f"tests/benchmarks/test_{name}.py"
        for name in ("gene_correlation", "gene_subsets", "generate", "model", "unseen")
    ),
    *("tests/benchmarks/test_quality.py", "tests/benchmarks/test_speedrun.py"),
    *("tests/launch/test_quickstart.py", "tests/slurm/"),
)
# texts, refusals and files, in the same rooms
NOT_NUMERICAL = (
    *(f"tests/scldm/evaluate/test_{name}.py" for name in ("report", "verdict")),
    *("tests/scldm/model/test_presets.py", "tests/scldm/kernels/test_available.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is numerical. The files that take longest go first, so that no core waits for the last of them."""
    for item in items:
        path = item.path.as_posix()
        if any(part in path for part in NUMERICAL) and not any(part in path for part in NOT_NUMERICAL):
            item.add_marker(pytest.mark.numerical)
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def rank(item: pytest.Item) -> int:
        longest = [k for k, path in enumerate(LONGEST) if path in item.path.as_posix()]
        return longest[0] if longest else len(LONGEST) + (item.path not in slow)

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """With `--dist loadfile`: one worker has all files of tests/slurm, which share a cluster and what it made."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def of_no_job() -> None:
    """A test that failed, or one of a verb that did, may have left the place of its process: others start processes."""
    for variable in PLACE:
        os.environ.pop(variable, None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The global generators, for what third-party code draws; ours take a seed. torch only where a test imported it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
