"""What every rank of test_engine.py runs: small runs named on the command line, one after another.

python follow.py JOBS.json        JOBS: a list of small_run's arguments
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from scldm.parallel.dist import close_world, world_of_environment
from scldm.parallel.engine import HardwareConfig
from scldm.train.optim import OptimConfig
from tests.scldm.train.small_runs import small_run


def main(jobs: Path) -> None:
    torch.set_num_threads(1)
    world = world_of_environment()
    for job in json.loads(jobs.read_text()):
        job |= {"hardware": HardwareConfig(**job["hardware"]), "optim": OptimConfig(**job["optim"])}
        try:
            small_run(job.pop("stage"), Path(job.pop("run_dir")), world=world, **job)
        except KeyboardInterrupt:
            continue
    close_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
