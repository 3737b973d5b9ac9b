"""Golden losses: 20 of each stage on fixed cells. A refactoring leaves them as they are; what changes them on purpose
says so in its commit and rewrites them:

    python -m tests.scldm.train.test_golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from scldm.parallel.engine import HardwareConfig
from scldm.train.optim import OptimConfig
from scldm.train.tracking import read_metrics
from tests.scldm.train.small_runs import small_run

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
STAGES = ("vae", "ldm")
# slow enough that training does not enlarge the last digit, in which two machines differ, to 1e-4
OPTIM = OptimConfig(lr=5e-4, clip=2.0, weight_decay=0.01)


def losses(stage: str, run_dir: Path) -> list[float]:
    """The loss of each of 20 steps, float32, one thread, two micro-batches a step."""
    torch.set_num_threads(1)
    small_run(stage, run_dir, optim=OPTIM, hardware=HardwareConfig("plain", micro_batch=8))
    return [row["loss"] for row in read_metrics(run_dir, "train")]


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_golden_ones(stage: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{stage}.json").read_text())
    assert len(golden) == 20
    assert losses(stage, tmp_path) == pytest.approx(golden, rel=1e-4)


if __name__ == "__main__":
    for name in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(losses(name, Path(folder)), indent=1)
        (GOLDEN / f"{name}.json").write_text(text + "\n")
        print(GOLDEN / f"{name}.json")
