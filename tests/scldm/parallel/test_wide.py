"""A layer as wide as those of the presets of billions, under ZeRO-3 with offload on two ranks.

What is real: width, heads, latent tokens, optimizer, and keys of hardware/many_nodes_zero3 but for the size of buckets.
What is small: one transformer block of the preset's 16 or 22, four cells, no genes. The whole network is tested narrow
(test_engine.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scldm.model.vae import VAE
from scldm.parallel.engine import HardwareConfig
from tests.rounding import LEAST
from tests.scldm.parallel.wide import CELLS, layer, preset, trained
from tests.scldm.train.small_runs import ALONE

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("1b", marks=pytest.mark.slow),
        pytest.param("3b", marks=pytest.mark.exhaustive),  # two ranks take 5.5 GB, and over a minute of CPU time
    ],
)
def test_a_layer_of_billions_trains_under_zero3_with_offload_as_on_the_plain_engine(name: str, tmp_path: Path) -> None:
    config = preset(name)
    assert (config.hardware.engine, config.hardware.zero_stage) == ("deepspeed", 3)
    module = layer(config)
    with torch.device("meta"):
        whole = VAE(config.model, n_genes=36_130)
    shapes = {key: p.shape for key, p in module.named_parameters()}
    assert shapes == {key: p.shape for key, p in whole.blocks[0].named_parameters()}, "it is a layer of the preset"
    first = {key: p.detach().clone() for key, p in module.named_parameters()}
    engine, losses, norms = trained(module, config, HardwareConfig("plain", CELLS), ALONE, {})
    last = {key: p.detach() for key, p in module.named_parameters()}
    torch.save(last, tmp_path / "plain.pt")
    n, way = sum(p.numel() for p in last.values()), sum(float((last[k] - first[k]).square().sum()) for k in last) ** 0.5
    del module, first, engine, last  # before the ranks take memory
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.scldm.parallel.wide", str(tmp_path), name]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3_000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [sum(of) for of in zip(*(rank["losses"] for rank in ranks))] == pytest.approx(losses, rel=LEAST)
    for rank in ranks:
        assert rank["norms"] == pytest.approx(norms, rel=LEAST)
        assert rank["held"] == pytest.approx(n / 2, rel=0.01)
        assert rank["whole_between_steps"] < 0.01 * n, "weights are cut for the ranks"
        assert rank["offloaded"]
        assert (rank["moments"], rank["moments_on"]) == (2 * rank["held"], ["cpu"])
    assert sum(rank["held"] for rank in ranks) == n
    # weights at the end, beside those of the plain engine. A part in a wrong place is as far off as training went, and
    # rounding is 1e-5 of that
    off = sum(rank["off"] for rank in ranks) ** 0.5
    assert off < 1e-3 * way
