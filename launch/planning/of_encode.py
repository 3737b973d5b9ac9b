"""What `scldm encode` takes once the autoencoder is trained: time, bytes and memory of the encoder's pass over all
cells, on the ranks of the training.

The verb computes as its precision=auto does: in bfloat16 on a GPU, in float32 on a CPU, whatever the precision of
training was, and not compiled. Reading order: EncodePlan, encode_of, gigabytes, shards_of.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from data_pipeline.convert.config import ShardsWriteConfig
from data_pipeline.stream.gene_set_config import as_whole_cells
from launch.encode import EncodeConfig
from launch.planning.config import GB, PlanVAEConfig
from scldm.model.flops import expressed_flops
from scldm.model.vae import VAEConfig
from scldm.networks import Precision
from scldm.train.step_cost import StepCost, vae_encode
from scldm.train.throughput import PEAK_TFLOPS

BYTES_OF_A_COUNT = 1.05  # compressed: 1,827 bytes a cell of 1,740 expressed genes (docs/sustained-run.md)
BESIDE_LATENTS = 72  # bytes a cell of 4,168: row, labels, headers of tars, index (docs/sustained-run.md)
WRITTEN_BYTES_S = 190e6  # of latents by a rank: sums, checksum and hash, on one core, without its disk
KERNELS_OF_A_CELL = 66  # of a cell that is read by itself on a CPU (AllGenesEncoder)
UNEVEN = 1.5  # times the mean that the busiest rank may have, before the plan says that shards are few


@dataclass(frozen=True)
class EncodePlan:
    """Of all cells, once.

    precision: that it computes in
    n_cells: of all splits that are known
    n_busiest: cells of the rank with most, as a rank encodes whole shards
    genes: what the encoder is given of a cell
    flops_per_cell: forward, of the encoder
    peak_bytes: of the device, weights and a batch. None on a CPU that reads expressed genes alone
    compute_s, launch_s: of the busiest rank, of which the longer counts
    write_s: of its latents, after the computing of each batch
    loader_s: in which the loader delivers its cells, beside both
    read_bytes, written_bytes: of shards, and of latents, by all ranks
    """

    precision: Precision
    n_cells: int
    n_ranks: int
    n_busiest: int
    genes: str
    batch: int
    flops_per_cell: float
    peak_bytes: float | None
    compute_s: float
    launch_s: float
    write_s: float
    loader_s: float
    read_bytes: float
    written_bytes: float

    @property
    def seconds(self) -> float:
        return max(max(self.compute_s, self.launch_s) + self.write_s, self.loader_s)

    @property
    def bound_by(self) -> str:
        """What takes most of it."""
        parts = {
            f"computing in {self.precision}": self.compute_s,
            "launching kernels": self.launch_s,
            "writing latents": self.write_s,
            "the loader": self.loader_s,
        }
        return max(parts, key=lambda name: parts[name])

    @property
    def cells_per_s(self) -> float:
        return self.n_cells / self.seconds

    def to_json(self) -> dict[str, Any]:
        more = {"seconds": self.seconds, "cells_per_s": self.cells_per_s, "bound_by": self.bound_by}
        return {**asdict(self), **more}

    def told(self, room_gb: float) -> list[str]:
        """Lines of the plan. room_gb: of a GPU, in 1e9 bytes, beside what CUDA takes."""
        of = "all genes" if self.genes == "all" else "expressed genes"
        takes = f"{self.seconds / 3_600:,.2f} hours" if self.seconds >= 360 else f"{self.seconds:,.1f} s"
        lines = [
            f"then `scldm encode` of {self.n_cells:,} cells by {of} on these ranks: {takes}, {self.cells_per_s:,.0f} "
            f"cells/s, bound by {self.bound_by}. {self.flops_per_cell / 1e9:,.3g} GFLOP a cell. It reads "
            f"{gigabytes(self.read_bytes)} and writes {gigabytes(self.written_bytes)}"
        ]
        if self.peak_bytes is not None:
            fits = self.peak_bytes / GB <= room_gb
            told = "" if fits else ", which does not fit: give `scldm encode` a smaller batch"
            lines.append(f"encode takes {self.peak_bytes / GB:,.2f} GB with batch={self.batch}{told}")
        if self.n_busiest * self.n_ranks > UNEVEN * self.n_cells:
            lines.append(
                f"shards are few for {self.n_ranks:,} ranks to encode: one has {self.n_busiest:,} cells, and the mean "
                f"is {self.n_cells / self.n_ranks:,.0f}"
            )
        return lines


def encode_of(config: PlanVAEConfig) -> EncodePlan | None:
    """None where the GPU's peak in bfloat16 is not known."""
    hardware, model, G = config.hardware, config.model.portable, config.n_genes
    batch, given = EncodeConfig.batch, as_whole_cells(config.data.given)
    on_cpu = hardware.gpu == "CPU"
    precision, kind = ("float32", "fp32") if on_cpu else ("bfloat16", "bf16")
    stated = hardware.peak_tflops if hardware.precision == kind else 0.0
    if not stated and hardware.gpu not in PEAK_TFLOPS:
        return None
    peak = 1e12 * (stated or PEAK_TFLOPS[hardware.gpu][kind])
    shards = shards_of(config)
    n_busiest = max(sum(shards[rank :: hardware.n_ranks]) for rank in range(hardware.n_ranks))
    n_given = G if given.policy == "all" else min(given.n_genes or config.expressed, G)
    if on_cpu and given.policy == "all":
        # what reads genes counts by the formula, and by its kernels. The rest is that of any batch
        cost = _encode(model, 1, batch, 1, False)
        flops = batch * expressed_flops(model, G, min(config.expressed, G))
        kernels, peak_bytes = cost.kernels + batch * KERNELS_OF_A_CELL, None
    else:
        cost = _encode(model, G, batch, n_given, given.policy != "all", 0.0 if on_cpu else hardware.memory_gb)
        flops, kernels, peak_bytes = cost.flops, cost.kernels, 4 * cost.n_parameters + cost.peak_bytes
    batches = n_busiest / batch
    read = config.cell_bytes or BYTES_OF_A_COUNT * min(config.expressed, G)
    latent = 4 * model.n_latents * model.latent_width
    return EncodePlan(
        precision=precision,
        n_cells=sum(shards),
        n_ranks=hardware.n_ranks,
        n_busiest=n_busiest,
        genes=given.policy,
        batch=batch,
        flops_per_cell=flops / batch,
        peak_bytes=peak_bytes,
        compute_s=batches * flops / (peak * hardware.mfu),
        launch_s=batches * 1e-6 * hardware.launch_us * kernels,
        write_s=n_busiest * latent / WRITTEN_BYTES_S,
        loader_s=n_busiest / hardware.loader_cells_s,
        read_bytes=sum(shards) * read,
        written_bytes=sum(shards) * (latent + BESIDE_LATENTS),
    )


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / GB:,.0f} GB" if n_bytes >= 100 * GB else f"{n_bytes / GB:,.3g} GB"


def shards_of(config: PlanVAEConfig) -> list[int]:
    """Cells of each shard, of all splits, in shards of the size that `scldm shards write` gives them."""
    most, sizes = ShardsWriteConfig.shard_cells, []
    for n in (config.n_cells, config.n_validation, config.n_test):
        sizes += [most] * (n // most) + [n % most] * (n % most > 0)
    return sizes


@cache
def _encode(
    model: VAEConfig, n_genes: int, n_cells: int, n_given: int, per_cell: bool, gpu_memory_gb: float = 0.0
) -> StepCost:
    """gpu_memory_gb: of a GPU, where it computes in bfloat16. 0 for a CPU"""
    device, bf16 = ("cuda", True) if gpu_memory_gb else ("cpu", False)
    how = {"device": device, "bf16": bf16, "memory_gb": gpu_memory_gb}
    return vae_encode(model, n_genes, n_cells, n_given, per_cell, **how)
