"""The kernels compile for an H100, without one: what the interpreter does not see, such as too much shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from scldm.kernels import pool, unpool

def compiled(kernel, stages, **constants):
    \"\"\"Shared memory in bytes, and whether its products run on Hopper's matrix units.\"\"\"
    in_bf16 = {"values_ptr", "T_ptr", "B_ptr", "b_ptr", "q_ptr", "k_ptr", "p_ptr"}
    def kind(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*i32" if name == "row_ptr" else "*bf16" if name in in_bf16 else "*fp32"
        return "fp32" if name == "eps" else "i32"
    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": stages})
    print(kernel.__name__, constants, done.metadata.shared)
    assert done.metadata.shared <= 227 * 1024
    assert "wgmma" in done.asm["ptx"]

types = {"BF16": True, "INTERPRETED": False}
shape = {"LATENTS": 64, "HEAD": 64, "GENES": pool.GENES, **types}
bins = {"FUNCTIONS": 16, "BINS": True}
compiled(pool._forward, pool.STAGES, CELLS=2, **bins, **shape)
compiled(pool._forward, pool.STAGES, CELLS=2, FUNCTIONS=16, BINS=False, **shape)
compiled(pool._forward, pool.STAGES, CELLS=pool.MOST_CELLS, **bins, **{**shape, "LATENTS": 32})
compiled(pool._backward, pool.STAGES, SHARED=True, **bins, **shape)
compiled(pool._backward, pool.STAGES, SHARED=False, **bins, **shape)
compiled(pool._backward, pool.STAGES, SHARED=True, FUNCTIONS=16, BINS=False, **shape)
shape = {"PAIRS": 128, "GENES": unpool.GENES, "HIDDEN": unpool.HIDDEN, **types}
compiled(unpool._forward, unpool.STAGES, HEADS=1, CHANNELS=unpool.CHANNELS, **shape)
compiled(unpool._to_tables, unpool.STAGES, SHARED=True, **shape)
compiled(unpool._to_latents, unpool.STAGES, **shape)
compiled(unpool._to_weights, unpool.STAGES, **shape)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_hopper(tmp_path):
    pytest.importorskip("triton", reason="needs the package triton, which the extra `test` brings on Linux")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10
