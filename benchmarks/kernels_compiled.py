"""`python -m benchmarks.kernels_compiled`: what the fused kernels take of a GPU, without one.

A training step of each preset is traced on tensors without memory. Each kernel that it launches is compiled for the
GPU, with the constants of that launch, instead of run. Rows, one set for each preset, precision and GPU: the most
shared memory, spills and registers of its kernels, against what is allowed, each with the kernel that takes it.

Reading order: the config, main, shape_of, traced, Compiler, resources.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported, by torch too: kernels are compiled, not emulated

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.report import Report, Row
from launch.config import compose, shipped
from launch.train_vae import TrainVAEConfig
from scldm import kernels
from scldm.batch import GeneCounts
from scldm.kernels import deviation, pool, unpool
from scldm.kernels.tile import Tile
from scldm.model.vae import VAE, VAEConfig

# compute capability times ten -> bytes of shared memory: of a block at most, of a multiprocessor (A100, H100)
SHARED = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024)}
RESERVED = 1024  # bytes of shared memory that a block takes beside its own
REGISTERS, THREADS = 65_536, 2_048  # of a multiprocessor
SPILLS = 192  # bytes of a thread at most: 48 of the 128 registers or more that it has; what is spilled stays in L1
N_GENES = 36_130  # human, Census
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
LEAST_BLOCKS = {"bf16": 2, "fp32": 1}  # on a multiprocessor: one computes while another waits for memory


@dataclass(frozen=True)
class KernelsCompiledConfig:
    """What is compiled, and where the figures go.

    presets: of configs/vae
    precisions: bf16, fp32
    architectures: compute capability times ten: 80 (A100), 90 (H100)
    save: write the JSON to this file as well
    """

    presets: list[str] = field(
        default_factory=lambda: sorted(p.stem for p in (shipped("configs") / "vae").glob("*.yaml"))
    )
    precisions: list[str] = field(default_factory=lambda: list(PRECISIONS))
    architectures: list[int] = field(default_factory=lambda: list(SHARED))
    save: str = ""


def main(config: KernelsCompiledConfig) -> Report:
    command = shlex.join(["python", "-m", "benchmarks.kernels_compiled", *sys.argv[1:]])
    settings = {"triton": triton.__version__, "torch": torch.__version__, "genes": N_GENES}
    report = Report("kernels_compiled", settings, command=command, save=config.save)
    names: set[str] = set()
    for architecture in config.architectures:
        for preset in config.presets:
            for precision in config.precisions:
                where = f"{preset}, {precision}, sm_{architecture}"
                print(where, file=sys.stderr)
                launches = traced(*shape_of(preset), PRECISIONS[precision], architecture)
                names |= {launch.name for launch in launches}
                for row in rows_of(launches, where, architecture, LEAST_BLOCKS[precision]):
                    report.add(row)
    report.settings["kernels"] = sorted(names)
    report.print(False)
    return report


def rows_of(launches: list[Compiled], where: str, architecture: int, least_blocks: int) -> list[Row]:
    """The most that any kernel of a step takes."""
    limit, whole = SHARED[architecture]

    def blocks(launch: Compiled) -> int:
        threads = 32 * launch.warps
        return min(whole // (launch.shared + RESERVED), REGISTERS // (launch.registers * threads), THREADS // threads)

    shared = max(launches, key=lambda launch: launch.shared)
    spilled = max(launches, key=lambda launch: launch.spilled)
    registers = max(launches, key=lambda launch: launch.registers)
    fewest = min(launches, key=blocks)
    return [
        Row(f"{where}: kernels compiled", len(launches), ""),
        Row.at_most(f"{where}: shared memory, {shared.name}", shared.shared, "B", limit),
        Row.at_most(f"{where}: spilled by a thread, {spilled.name}", spilled.spilled, "B", SPILLS),
        Row(f"{where}: registers of a thread, {registers.name}", registers.registers, ""),
        Row.at_least(f"{where}: blocks on a multiprocessor, {fewest.name}", blocks(fewest), "", least_blocks),
    ]


def shape_of(preset: str) -> tuple[VAEConfig, int, int]:
    """Its autoencoder, cells of a forward pass, and genes of each."""
    config = compose(TrainVAEConfig, [f"vae/{preset}", "data.shards=none", "run_dir=none"])
    given = config.data.given
    return config.model, config.hardware.micro_batch, given.n_genes or round(given.share * N_GENES)


def traced(model: VAEConfig, n_cells: int, n_genes: int, dtype: torch.dtype, architecture: int) -> list[Compiled]:
    """Every kernel of a training step, with gene sets that cells share and with each cell's own."""
    compiler = Compiler(architecture)
    with compiler.instead_of_running(), FakeTensorMode():
        vae = VAE(replace(model, attention="fused", n_layers=0), N_GENES)
        for compiler.sets, ids_shape in (("shared", (n_genes,)), ("own", (n_cells, n_genes))):
            counts_BS = torch.ones(n_cells, n_genes, dtype=torch.int32)
            given = GeneCounts(torch.ones(ids_shape, dtype=torch.int64), counts_BS)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                _, predicted = vae(given, given.gene_ids)
                loss = predicted.nll_B(given, counts_BS.sum(1).float()).sum()
            loss.backward()
    return compiler.found


@dataclass(frozen=True)
class Compiled:
    """A kernel for a GPU. shared: bytes of a block; spilled: bytes of a thread."""

    name: str
    programs: int
    warps: int
    shared: int
    registers: int
    spilled: int


class Compiler:
    """Stands for the driver of a GPU that is not there, and for `launch` of the kernels."""

    def __init__(self, architecture: int) -> None:
        self.target, self.sets = GPUTarget("cuda", architecture, 32), ""
        self.found: list[Compiled] = []

    def get_current_device(self) -> int:
        return self.target.arch  # triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    @contextmanager
    def instead_of_running(self) -> Iterator[None]:
        kept = [(pool, "launch"), (unpool, "launch"), (deviation, "launch"), (kernels, "check_available")]
        before = [getattr(module, name) for module, name in kept]
        driver.set_active(self)
        for module, name in kept:
            setattr(module, name, self.compile if name == "launch" else lambda device: None)
        try:
            yield
        finally:
            for (module, name), value in zip(kept, before):
                setattr(module, name, value)

    def compile(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, tile: Tile, **constants: Any) -> None:
        constants |= {"GENES": tile.genes, "INTERPRETED": False}
        types = [x.dtype if isinstance(x, torch.Tensor) else x for x in arguments]
        done = kernel.warmup(
            *types, grid=grid, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, **constants
        )
        name = f"{kernel.__module__.rpartition('.')[2]}{kernel.__name__}, {self.sets} sets"
        registers, spilled = resources(done.asm["cubin"])
        self.found.append(Compiled(name, math.prod(grid), tile.warps, done.metadata.shared, registers, spilled))


@cache  # presets share kernels
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


if __name__ == "__main__":
    main(compose(KernelsCompiledConfig, sys.argv[1:]))
