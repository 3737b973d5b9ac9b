"""Begins to write latents of a cell set, and is killed in the middle of the first shard: CELLS OUT."""

import os
import signal
import sys
from collections.abc import Iterator

import numpy as np

from data_pipeline.format.read_shards import ShardSet
from data_pipeline.write_latents import LatentWriter

SHAPE = (3, 2)


def two_blocks() -> Iterator[np.ndarray]:
    for _ in range(2):
        yield np.zeros((32, *SHAPE), np.float32)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    writer = LatentWriter(sys.argv[2], ShardSet(sys.argv[1]), "model", SHAPE)
    with writer.begun():
        writer.write_shard(0, two_blocks())
