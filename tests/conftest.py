"""What every test starts from: one thread, seeded generators, and no tracking server or job from around it."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

# before numpy and torch are imported anywhere: with more threads a suite of 36 s took 124 s on two cores
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["MPLBACKEND"] = "Agg"
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton asks when it is first imported, as by torch
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
for variable in [name for name in os.environ if name.startswith(("SLURM_", "MLFLOW_TRACKING_", "MLFLOW_EXPERIMENT_"))]:
    del os.environ[variable]
for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(variable, None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# the same examples in every run, and no deadline that a busy machine misses
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The global generators, for what third-party code draws; ours take a seed. torch only where a test imported it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
