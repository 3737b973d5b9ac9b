"""The keys of `scldm plan`: a training's, and the machine that it is planned for."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.stream.loader import LoaderConfig, StreamConfig
from launch.train_ldm import TrainLDMConfig
from launch.train_vae import TrainVAEConfig
from scldm.checked import Checked, checked
from scldm.errors import InputError
from scldm.parallel.engine import HardwareConfig
from scldm.train.throughput import MEMORY_TB_S, PEAK_TFLOPS

GB = 1e9


@dataclass(frozen=True)
class PlannedHardware(HardwareConfig):
    """The machine, as HardwareConfig lays work on it, and what it is.

    nodes: of the job
    gpus_per_node: ranks on each
    gpu: one of a short table of peaks, with sources in scldm/train/throughput.py. peak_tflops goes before it
    memory_gb: of a GPU, in 1e9 bytes
    context_gb: what CUDA, NCCL and the allocator's gaps take of it
    mfu: share of the peak that is reached by what computes
    loader_cells_s: cells that the loader of a rank delivers a second, on a core of its own. The default was measured
        with a gene set for each cell (benchmarks/README.md, "The stream"). A shared set takes half as long
    host_copy_gb_s: at which a rank's share is copied to the host's memory for a checkpoint, in 1e9 bytes a second. 25
        is an assumption, half of what PCIe 5 has
    launch_us: what the host takes to launch a kernel, in microseconds. A micro-batch takes no less than that for each
        of its kernels. 5 is an assumption, as torch takes 5 to 10 for an operation that is not compiled. It was not
        measured here: `python -m benchmarks.gpu_profile` measures it
    memory_tb_s: of a GPU's memory, in 1e12 bytes a second, at which the optimizer runs. 0 takes that of `gpu`, from
        data sheets (scldm/train/throughput.py)
    node_link_gb_s: what a GPU sends to others of its node in a ring, in 1e9 bytes a second. 370 is what NCCL reaches on
        an H100's NVLink of 450 (NVIDIA/nccl-tests issue 212)
    network_gb_s: what a node sends to others through all its adapters. 376 are eight of 400 Gb/s at 47 each, as NCCL
        reaches 46 to 48 (NVIDIA/nccl-tests issue 290). Saturn Cloud's guide to NCCL tests expects 400 to 450 of such
        nodes, and 250 to 300 of A100 nodes with 200 Gb/s adapters. Slow networks reach far less: 30 was seen on four
        nodes with 400 Gb/s in all (NVIDIA/nccl issue 527)
    """

    nodes: int = checked(1, at_least=1)
    gpus_per_node: int = checked(8, at_least=1)
    gpu: str = "H100"
    memory_gb: float = checked(80.0, above=0)
    context_gb: float = checked(3.0, at_least=0)
    mfu: float = checked(0.35, above=0, at_most=1)
    launch_us: float = checked(5.0, at_least=0)
    memory_tb_s: float = checked(0.0, at_least=0)
    loader_cells_s: float = checked(85_000.0, above=0)
    host_copy_gb_s: float = checked(25.0, above=0)
    node_link_gb_s: float = checked(370.0, above=0)
    network_gb_s: float = checked(376.0, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, known in (("peak_tflops", PEAK_TFLOPS), ("memory_tb_s", MEMORY_TB_S)):
            if not getattr(self, key) and self.gpu not in known:
                raise InputError(f"hardware.gpu={self.gpu}: known are {', '.join(known)}. Or give hardware.{key}")

    @property
    def n_ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def peak(self) -> float:
        """FLOP/s of a GPU."""
        return 1e12 * (self.peak_tflops or PEAK_TFLOPS[self.gpu][self.precision])

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a GPU's memory."""
        return 1e12 * (self.memory_tb_s or MEMORY_TB_S[self.gpu])

    @property
    def ring(self) -> float:
        """Bytes a second that each rank sends around a ring of all. A ring crosses the network of a node once, not once
        a GPU. With as many rings as adapters, a node's whole network carries what each of its ranks sends."""
        within = GB * self.node_link_gb_s
        return within if self.nodes == 1 else min(within, GB * self.network_gb_s)


@dataclass(frozen=True)
class Planned(Checked):
    """A training config, with what is not known before there are data.

    run_dir: taken as training takes it. Nothing is written
    n_genes: vae: of the vocabulary. 0 takes those of data.shards
    n_latents: ldm: latent tokens of a cell. 0 takes those of data.shards, or of the run in vae
    latent_width: ldm: their width, likewise
    n_cells: to train on. 0 takes those of data.shards
    n_validation: held-out cells, of which train.validation_cells are taken. 0 takes those of data.shards. Where neither
        tells it, validation is not planned
    expressed: genes that a cell expresses, as the loader decodes 3 bytes of each
    compare: plan other numbers of nodes, ZeRO stages and micro-batches too, and recommend one
    json: print JSON, not the table
    """

    run_dir: str = ""
    n_genes: int = checked(0, at_least=0)
    n_latents: int = checked(0, at_least=0)
    latent_width: int = checked(0, at_least=0)
    n_cells: int = checked(0, at_least=0)
    n_validation: int = checked(0, at_least=0)
    expressed: int = checked(2_000, at_least=1)
    hardware: PlannedHardware = field(default_factory=PlannedHardware)
    compare: bool = True
    json: bool = False


@dataclass(frozen=True)
class PlanVAEConfig(Planned, TrainVAEConfig):
    """What `scldm train vae` takes.

    n_test: cells that are neither trained nor validated on, and are encoded too. 0 takes those of data.shards
    cell_bytes: bytes of a cell in the shards. 0 takes those of data.shards, or 1.05 for each expressed gene
    """

    data: LoaderConfig = field(default_factory=lambda: LoaderConfig(shards=""))
    n_test: int = checked(0, at_least=0)
    cell_bytes: int = checked(0, at_least=0)


@dataclass(frozen=True)
class PlanLDMConfig(Planned, TrainLDMConfig):
    """What `scldm train ldm` takes."""

    data: StreamConfig = field(default_factory=lambda: StreamConfig(shards=""))


PlanConfig = PlanVAEConfig | PlanLDMConfig


def is_of_latents(config: PlanConfig) -> bool:
    """Whether cells come as latents, which are copied as they are."""
    return isinstance(config, PlanLDMConfig) and not config.vae
