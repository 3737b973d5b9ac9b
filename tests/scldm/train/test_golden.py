"""Golden losses: 20 of each stage on fixed cells. A refactoring leaves them as they are; what changes them on purpose
says so in its commit and rewrites them:

    python -m tests.scldm.train.test_golden
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from scldm.parallel.engine import HardwareConfig
from scldm.train.optim import OptimConfig
from tests.rounding import Undisturbed, curve
from tests.scldm.train.small_runs import small_run

pytestmark = pytest.mark.heavy

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
STAGES = ("vae", "ldm")
OPTIM = OptimConfig(lr=5e-4, clip=2.0, weight_decay=0.01)


def run(stage: str, run_dir: Path, **more: Any) -> None:
    """20 steps, float32, two micro-batches a step."""
    small_run(stage, run_dir, optim=OPTIM, hardware=HardwareConfig("plain", micro_batch=8), **more)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_golden_ones(stage: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{stage}.json").read_text())
    assert len(golden) == 20
    here = Undisturbed.of(tmp_path, partial(run, stage))
    off = (curve(here.run_dir, "loss") / torch.tensor(golden, dtype=torch.float64) - 1).abs() / here.band("loss")
    assert (off <= 1).all(), f"a loss is {off.max():.3g} times as far from the golden one as rounding takes it"


def test_a_fault_of_a_ten_thousandth_would_show(tmp_path: Path) -> None:
    """In the loss, or from the second step on in the rate; rounding here takes no loss as far as that."""
    for stage in STAGES:
        here = Undisturbed.of(tmp_path / stage, partial(run, stage))
        assert here.band("loss").max() < 1e-4
        faulty = replace(OPTIM, lr=OPTIM.lr * 1.01)
        small_run(stage, tmp_path / stage / "faulty", optim=faulty, hardware=HardwareConfig("plain", micro_batch=8))
        with pytest.raises(AssertionError, match="times as far off as allowed"):
            here.assert_same(tmp_path / stage / "faulty", {"loss": "train"})


if __name__ == "__main__":
    for name in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            run(name, Path(folder))
            text = json.dumps(curve(Path(folder), "loss").tolist(), indent=1)
        (GOLDEN / f"{name}.json").write_text(text + "\n")
        print(GOLDEN / f"{name}.json")
