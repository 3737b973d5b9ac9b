"""What the log says of speed: every number from known times, cells and peaks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scldm.train.throughput import PEAK_TFLOPS, Meter, peak_flops
from scldm.train.tracking import read_metrics
from tests.scldm.train.small_runs import ALONE, small_run


def test_a_row_is_of_the_cells_and_the_time_between_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def loader() -> Any:
        while True:
            clock[0] += 1.0  # the loader takes a second, what follows three
            yield None

    meter, stream = Meter(ALONE, flops_per_cell=5.0, peak=100.0), loader()
    for loss in (4.0, 8.0):
        meter.wait_for(stream)
        clock[0] += 3.0
        meter.add([{"loss": torch.tensor(loss), "cells": torch.tensor(2.0)}])
    row, own = meter.read()
    assert row["loss"] == 3.0  # 12 over the 4 cells that count
    assert (row["cells_per_s"], row["cells_per_s_rank"], row["step_s"]) == (0.5, 0.5, 4.0)
    assert (row["waiting_share"], own["waiting_share"]) == (0.25, 0.25)
    assert row["mfu"] == pytest.approx(0.5 * 5.0 / 100.0)
    assert 0.01 < row["memory_gb"] < 100
    meter.wait_for(stream)
    meter.add([{"loss": torch.tensor(1.0), "cells": torch.tensor(2.0)}])
    with meter.paused():  # a validation is no training
        clock[0] += 1_000
    meter.wait_for(stream)
    meter.add([{"loss": torch.tensor(3.0), "cells": torch.tensor(2.0)}])
    row, _ = meter.read()
    assert (row["step_s"], row["cells_per_s"], row["loss"]) == (1.0, 2.0, 1.0)


def test_a_row_covers_all_steps_since_the_one_before_whatever_is_saved_validated_or_resumed_between(
    tmp_path: Path,
) -> None:
    small_run("ldm", tmp_path / "each", steps=12)
    each = {row["step"]: row["velocity_loss"] for row in read_metrics(tmp_path / "each", "train")}
    how: Any = {"steps": 12, "log_every": 6, "save_every": 4, "validate_every": 5}
    with pytest.raises(KeyboardInterrupt):
        small_run("ldm", tmp_path / "rows", fail_at=9, **how)
    small_run("ldm", tmp_path / "rows", **how)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "rows", "train")}
    assert rows.keys() == {6, 12}
    for last, row in rows.items():
        of_steps = np.array([each[step] for step in range(last - 5, last + 1)])
        n_cells = np.array([2 if step % 4 == 0 else 16 for step in range(last - 5, last + 1)])  # 50 cells an epoch
        assert row["velocity_loss"] == pytest.approx((of_steps * n_cells).sum() / n_cells.sum(), rel=1e-6)
    # the rate is of this process's steps alone, 9 to 12: not of 90 cells in the time of four steps
    assert rows[12]["cells_per_s"] * rows[12]["step_s"] < 16


def test_a_peak_is_stated_or_known_by_name_and_else_there_is_no_mfu() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu, "fp32") == 0.0
    assert peak_flops(cpu, "fp32", 0.25) == 2.5e11
    # TF32's peak would be half of bfloat16's, and is not switched on
    gpus = [kinds for name, kinds in PEAK_TFLOPS.items() if name != "CPU"]
    assert all(kinds["bf16"] > 3 * kinds["fp32"] > 0 for kinds in gpus)
    assert torch.get_float32_matmul_precision() == "highest"
    assert "mfu" not in Meter(ALONE, 1.0, 0.0).__dict__


def test_one_log_and_a_file_for_each_rank_if_asked(tmp_path: Path) -> None:
    small_run("ldm", tmp_path / "one", steps=4)
    assert not (tmp_path / "one" / "ranks").exists()
    small_run("ldm", tmp_path / "two", steps=4, rank_logs=True)
    rows = [json.loads(line) for line in (tmp_path / "two" / "ranks" / "0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0].keys() == {"step", "cells_per_s", "waiting_share", "memory_gb"}
    assert {"loss", "velocity_loss", "grad_norm", "lr", "cells_per_s_rank"} <= read_metrics(tmp_path / "two", "train")[
        0
    ].keys()
