"""Before a job trains: is every node up, alike, healthy, and as fast as the others? One task per GPU runs it, by srun.

The first rank of each node leaves word that it began before torch is read, which may take long from a busy file system.
The rest is in preflight_stages.py, imported after that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.cluster.node_tokens import BEGUN, leave


def main(words: Sequence[str]) -> int:
    """One rank of the preflight of a verb's command line. Returns its exit code."""
    hosts, local = os.environ["SCLDM_HOSTS"].split(), int(os.environ["SLURM_LOCALID"])
    if local == 0:
        per_node = int(os.environ["SLURM_NTASKS"]) // len(hosts)
        with suppress(OSError):  # that it can't write there is found, and told, later
            leave(Path(os.environ["SCLDM_NOTES"]), hosts[int(os.environ["SLURM_PROCID"]) // per_node], BEGUN)
    from launch.cluster.preflight_stages import run

    return run(words)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a thread may still wait within a collective operation
