"""What a rank's memory is made of while it trains: in use, or free in the heap of the C library and not given back.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.heap STEPS EVERY WORDS OF scldm train vae ...

Each rank prints a line of JSON each EVERY steps, and one more after malloc_trim(0) at step STEPS. It needs glibc.
Reading order: Heap, main.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

from launch.cli import run_verb
from scldm.train.ema import EMA

NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Heap(ctypes.Structure):
    """mallinfo2(3), bytes over all arenas. uordblks: in use. fordblks: free. hblkhd: mapped by themselves"""

    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def main(last: int, every: int, words: list[str]) -> int:
    """Train, and print at every so many steps. Returns the exit code."""
    libc, update, rank = ctypes.CDLL("libc.so.6"), EMA.update, int(os.environ.get("RANK", 0))
    libc.mallinfo2.restype = Heap

    def sample(at: str) -> None:
        heap, lines = libc.mallinfo2(), Path("/proc/self/smaps_rollup").read_text().splitlines()
        own = next(1_024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
        parts = {"own": own, "in_use": heap.uordblks, "free": heap.fordblks, "mapped": heap.hblkhd}
        mb = {name: round(n_bytes / 1e6, 2) for name, n_bytes in parts.items()}
        print(json.dumps({"rank": rank, "at": at, "objects": len(gc.get_objects()), "MB": mb}), flush=True)

    def updated(self: EMA) -> None:
        update(self)
        if self.n_updates % every == 1:
            sample(f"step {self.n_updates}")
        if self.n_updates == last:
            gc.collect()
            libc.malloc_trim(0)
            sample("trimmed")

    EMA.update = updated
    return run_verb("train vae", words)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
