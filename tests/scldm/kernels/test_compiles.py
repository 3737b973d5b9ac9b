"""The kernels compile for an A100 and an H100, without one: what the interpreter does not see, such as too much shared
memory, or registers that spill. `python -m benchmarks.kernels_compiled` makes the figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.config import shipped

ROOT = Path(__file__).resolve().parents[3]
FIGURES = ROOT / "benchmarks/kernels-compiled.json"
KERNELS = ("deviation_forward", "pool_forward", "pool_combine", "unpool_forward")
KERNELS += ("pool_backward", "deviation_backward", "unpool_to_tables", "unpool_to_latents", "unpool_to_weights")
PRESETS = sorted(path.stem for path in (shipped("configs") / "vae").glob("*.yaml"))
# width, latent tokens, heads of the encoder and of the decoder: the widest heads, the most pairs, nothing round
SHAPES = [(512, 64, 2, 1), (256, 128, 2, 1), (128, 16, 1, 8), (512, 16, 2, 4), (96, 20, 3, 2), (64, 128, 4, 1)]
SHAPES += [(330, 100, 3, 1)]  # as large a tile as there may be, not filled
ONE_SHAPE = """
import sys, torch
from benchmarks.kernels_compiled import SHARED, SPILLS, traced
from scldm.model.vae import VAEConfig

width, latents, heads, cross = map(int, sys.argv[1:])
model = VAEConfig(width=width, n_latents=latents, n_heads=heads, decoder_cross_heads=cross)
for architecture, (limit, _) in SHARED.items():
    for dtype in (torch.bfloat16, torch.float32):
        for kernel in traced(model, 6, 1_000, dtype, architecture):
            print(architecture, dtype, kernel)
            assert kernel.shared <= limit and kernel.spilled <= SPILLS, kernel
"""


def run(arguments: list[str], cache: Path) -> str:
    pytest.importorskip("triton", reason="needs the package triton, which the extra `test` brings on Linux")
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def check(report: dict[str, Any], presets: list[str]) -> None:
    """Every kernel is there, with shared and with own sets; every preset x precision x GPU is, within its limits."""
    assert not [row for row in report["rows"] if row["met"] is False]
    wanted = {f"{kernel}, {sets} sets" for kernel in KERNELS for sets in ("shared", "own")}
    combined = {name for name in wanted if "pool_combine" in name}  # where cells are few
    assert wanted - combined <= set(report["settings"]["kernels"])
    names = [row["name"] for row in report["rows"]]
    for place in [f"{preset}, {x}, sm_{arch}" for preset in presets for x in ("bf16", "fp32") for arch in (80, 90)]:
        launches = next(row["value"] for row in report["rows"] if row["name"] == f"{place}: kernels compiled")
        assert launches >= len(wanted - combined)
        for what in ("shared memory", "spilled by a thread", "registers of a thread", "blocks on a multiprocessor"):
            assert len([name for name in names if name.startswith(f"{place}: {what}, ")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", ["20m", *(pytest.param(p, marks=pytest.mark.exhaustive) for p in PRESETS if p != "20m")]
)
def test_a_presets_kernels_fit_a_gpu(preset, tmp_path):
    run(["-m", "benchmarks.kernels_compiled", f"presets=[{preset}]", f"save={tmp_path / 'found.json'}"], tmp_path)
    report = json.loads((tmp_path / "found.json").read_text())
    check(report, [preset])
    assert preset != "20m" or any("pool_combine" in name for name in report["settings"]["kernels"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_kernels_fit_a_gpu(shape, tmp_path):
    assert run(["-c", ONE_SHAPE, *map(str, shape)], tmp_path).count("unpool_to_weights") == 8


def test_the_figures_are_of_all_presets_and_the_pinned_compiler():
    report = json.loads(FIGURES.read_text())
    check(report, PRESETS)
    assert FIGURES.stat().st_size < 60_000
    assert f"triton=={report['settings']['triton']}" in (ROOT / "constraints.txt").read_text().splitlines()
