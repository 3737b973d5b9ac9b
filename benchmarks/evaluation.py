"""What `scldm evaluate` costs on an atlas. Time and memory of `compare` on simulated
cells of ten types under control and treatment.

Reading order: the config, the cells, main.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from benchmarks.report import Report, Row, run_benchmark
from scldm.evaluate.cells import Cells
from scldm.evaluate.compare import compare
from scldm.evaluate.config import EvaluateConfig

PURPOSE = "Measure the time and the memory that an evaluation takes on an atlas of simulated cells."

EXAMPLE = """
python -m benchmarks.evaluation cells=20_000
"""


@dataclass(frozen=True)
class EvaluationConfig:
    """How many cells, and where the figures go.

    cells: of the training, the test and the generated set each; a tenth of that for validation
    genes: of all sets
    save: write the JSON to this file as well
    """

    cells: int = 100_000
    genes: int = 2_000
    save: str = ""


CONFIG = EvaluationConfig


def simulated(name: str, seed: int, n_cells: int, n_genes: int) -> Cells:
    """Poisson counts of ten types; a tenth of them is above 0. One gene in twenty rises e-fold under treatment."""
    truth, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    profile_TG = np.exp(truth.normal(-3, 1.2, n_genes) + truth.normal(0, 0.5, (10, n_genes)))
    effect_G = np.where(truth.random(n_genes) < 0.05, np.e, 1.0)
    type_n, treated_n = rng.integers(0, 10, n_cells), rng.integers(0, 2, n_cells)
    blocks = []
    for start in range(0, n_cells, 2_000):
        rows = slice(start, start + 2_000)
        rate_BG = profile_TG[type_n[rows]] * np.where(treated_n[rows, None] == 1, effect_G, 1)
        blocks.append(sp.csr_matrix(rng.poisson(rate_BG * rng.gamma(8, 1 / 8, (len(rate_BG), 1))).astype(np.int32)))
    labels = {
        "cell_type": np.array([f"type {k}" for k in range(10)])[type_n],
        "treatment": np.array(["control", "treated"])[treated_n],
    }
    return Cells.of_labels(sp.csr_matrix(sp.vstack(blocks)), labels, tuple(f"g{k}" for k in range(n_genes)), name)


def main(config: EvaluationConfig) -> Report:
    sizes = {"train": config.cells, "validation": config.cells // 10, "test": config.cells, "generated": config.cells}
    sets = [simulated(name, k, n, config.genes) for k, (name, n) in enumerate(sizes.items())]
    wall, cpu = time.perf_counter(), time.process_time()
    found = compare(*sets, EvaluateConfig())  # pyright: ignore[reportCallIssue]  # four sets
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    report = Report("evaluation", {"cells a side": config.cells, "genes": config.genes}, save=config.save)
    report.add(Row("combinations scored one by one", len(found["scored_combinations"]), ""))
    report.add(Row.at_most("time", wall, "s", 600.0))
    report.add(Row("CPU time", cpu, "s"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report.add(Row.at_most("peak memory, with the cells", peak / 2**30, "GiB", 8.0))
    report.print(False)
    return report


if __name__ == "__main__":
    sys.exit(run_benchmark("evaluation"))
