"""The external shuffle's runs, as an atlas has them by the thousand."""

from __future__ import annotations

import os
import resource

import numpy as np

from data_pipeline.convert.shuffle import Arena, RunWriter, read_range
from tests.data_pipeline.small_sets import narrow


def test_many_runs_are_not_open_at_once(tmp_path):
    """A process may have 1,024 files open; 16 million cells make more runs than that allows at two files each."""
    positions = np.random.default_rng(0).permutation(200)
    for unit in range(40):
        mine = positions[5 * unit : 5 * unit + 5]
        writer = RunWriter(tmp_path, unit, Arena(1 << 12))
        writer.add(narrow(np.arange(6), mine, mine + 1, 200), mine)  # one count a cell: its position, and that plus 1
        writer.flush()
    stems = [tmp_path / f"{unit:05d}-000" for unit in range(40)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    try:
        found, cells, order = read_range(stems, 50, 150)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.tolist() == list(range(50, 150))
    assert cells.take(order).steps.tolist() == list(range(51, 151))
    assert cells.take(order).small.tolist() == list(range(51, 151))
