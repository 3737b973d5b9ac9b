"""The plan of a training that has begun, as RUN/plan.json. `scldm train` starts it beside itself, in a process of its
own with little priority: counting kernels and FLOPs takes seconds, in which training goes on.

    python -m launch.planning.of_run vae RUN '{"gpu": "H100", "memory_gb": 80, "nodes": 4}' PARENT
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from launch.plan import cut, with_data
from launch.planning.config import PlanLDMConfig, PlanVAEConfig
from launch.planning.layouts import compared
from launch.planning.plan import plan_of
from scldm.files import write_json
from scldm.given_json import typed
from scldm.train.run_folder import CONFIG, PLAN, read_config


def give_way() -> None:
    """Run only where nobody else wants the processor. Training starts this process in a session of its own. Linux may
    weigh sessions against one another, each with a priority of its own (sched(7), autogroups)."""
    os.nice(19)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")


def end_with(parent: int) -> None:
    """End this process soon after the training, whatever became of that.

    parent: the number of the training's process
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(words: Sequence[str]) -> int:
    """Write the plan of a run's config, and how other layouts would do. Returns the exit code.

    words: vae or ldm, the run folder, and what its machine is: keys of PlannedHardware, as JSON
    """
    stage, run, machine = words[:3]
    try:
        of = read_config(Path(run))
        of["hardware"] |= json.loads(machine)
        config = typed(PlanVAEConfig if stage == "vae" else PlanLDMConfig, of, f"{run}/{CONFIG}")
        config = cut(with_data(config))
        plan = plan_of(config)
        write_json(Path(run) / PLAN, plan.to_json())  # a short run is to have it too
        write_json(Path(run) / PLAN, {**plan.to_json(), "compared": [other.row() for other in compared(plan)]})
    except Exception as error:  # whatever it is: the run goes on without a plan
        why = " ".join(f"{error}".split()) or type(error).__name__
        print(f"scldm: no {PLAN}: {why}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    give_way()
    threading.Thread(target=end_with, args=(int(sys.argv[4]),), daemon=True).start()
    sys.exit(main(sys.argv[1:]))
