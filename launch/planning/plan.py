"""What a training takes of a machine: memory, time, and what makes it fit.

Reading order: Plan, plan_of, costs of a micro-batch, memory of a rank, remedies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from data_pipeline.stream.order import reads_of_a_block
from launch.planning.config import GB, PlanConfig, PlanLDMConfig, PlannedHardware, PlanVAEConfig, is_of_latents
from launch.planning.of_encode import EncodePlan, encode_of
from launch.train_vae import genes_of, sets_per_cell
from launch.training import whole_cells
from scldm.model.dit import DiTConfig
from scldm.model.flops import vae_flops
from scldm.networks import PREVIEW_BYTES, cell_bytes, preview_cells
from scldm.parallel.deepspeed_json import BUCKET
from scldm.train.budget import Memory, fsdp_memory, fsdp_sent_bytes, rank_memory, sent_bytes
from scldm.train.step_cost import StepCost, dit_step, vae_step

# bytes of a rank's share of the parameters that a step moves once the pass is done, 4 B a number: the norm reads the
# gradient, clipping reads and writes it, AdamW reads gradient, weight and two moments and writes three of them, the EMA
# reads weight and EMA and writes one: 1 + 2 + 7 + 3
OPTIMIZER_BYTES = 4 * 13
# what JSON calls as the plan does
IN_JSON = (
    *("launch_s", "optimizer_s", "exchange_s", "loader_s", "save_s", "step_s", "validation_s", "validations"),
    *("busy", "bound_by", "cells_per_s", "days"),
)
MOST_VALIDATION = 0.1  # of the time of the steps, before the plan says how to validate less
_vae = cache(vae_step)


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    by_stage: ZeRO stage -> memory of a rank, for those that the engine has
    fits: whether the configured stage does
    remedies: changes that make it fit, the gentlest first
    kernels: that a rank launches for the passes of a step, without the optimizer's. None where the network is
        compiled, as then nobody knows before
    launch_s, compute_s: of those passes, of which the longer counts
    optimizer_s: of clipping, AdamW and EMA, after the passes. None where the host's memory has them
    exchange_s: between ranks. Under the backward pass where the engine overlaps them
    loader_s: in which the loader delivers a step's cells: a step takes no less. 0 for latents, which are copied
    save_s: of a step, for what a checkpoint holds training up
    validation_s: of one pass over the validation cells, with all their genes. None where their number is not known
    encode: of all cells by the trained autoencoder. None for the second stage
    """

    config: PlanConfig
    cost: StepCost
    accumulation: int
    by_stage: dict[int, Memory]
    fits: bool
    remedies: list[str]
    formula_flops: float
    sent_bytes: float
    kernels: int | None
    launch_s: float
    compute_s: float
    optimizer_s: float | None
    exchange_s: float
    loader_s: float
    save_s: float
    step_s: float
    validation_s: float | None
    encode: EncodePlan | None

    @property
    def busy(self) -> float:
        """Share of a step in which the GPU computes or updates weights."""
        return (self.compute_s + (self.optimizer_s or 0.0)) / self.step_s

    @property
    def bound_by(self) -> str:
        """What takes most of a step."""
        parts = {
            "computing": self.compute_s,
            "launching kernels": self.launch_s,
            "the exchange between ranks": self.exchange_s,
            "the loader": self.loader_s,
            "the optimizer": self.optimizer_s or 0.0,
        }
        return max(parts, key=lambda name: parts[name])

    @property
    def cells_per_s(self) -> float:
        return self.config.train.global_batch / self.step_s

    @property
    def cells_per_gpu(self) -> float:
        return self.cells_per_s / self.config.hardware.n_ranks

    def row(self) -> dict[str, int | float]:
        """One layout among others."""
        hardware = self.config.hardware
        return {
            "nodes": hardware.nodes,
            "ranks": hardware.n_ranks,
            "zero_stage": hardware.zero_stage,
            "micro_batch": hardware.micro_batch,
            "gb": self.by_stage[hardware.zero_stage].peak / GB,
            "cells_per_s": self.cells_per_s,
            "cells_per_s_and_gpu": self.cells_per_gpu,
            "busy": self.busy,
            "days": self.days,
            "gpu_days": self.days * hardware.n_ranks,
        }

    @property
    def validations(self) -> int:
        return self.config.train.steps // self.config.train.validate_every

    def of_validation(self) -> list[str]:
        """Lines on all validations of the run, beside its steps."""
        if self.validation_s is None:
            return ["validation is not planned: give n_validation, or data.shards"]
        config, each_s = self.config, self.validation_s
        total_s = self.validations * each_s
        share = total_s / (config.train.steps * self.step_s)
        lines = [
            f"{self.validations:,} validations of {validated(config):,} whole cells, {each_s:,.1f} s each: "
            f"{total_s / 86_400:,.2f} days more, {share:.0%} of what the steps take"
        ]
        if share > MOST_VALIDATION:
            lines.append("validate on fewer cells (train.validation_cells), or less often (train.validate_every)")
        return lines

    @property
    def days(self) -> float:
        return self.config.train.steps * self.step_s / 86_400

    def to_json(self) -> dict[str, Any]:
        config, cost = self.config, self.cost
        return {
            "ranks": config.hardware.n_ranks,
            "accumulation": self.accumulation,
            "cost": dataclasses.asdict(cost),
            "memory": {stage: memory.to_json() for stage, memory in self.by_stage.items()},
            "fits": self.fits,
            "remedies": self.remedies,
            "flops_per_cell": cost.flops / config.hardware.micro_batch,
            "formula_flops_per_cell": self.formula_flops,
            "sent_bytes_per_step": self.sent_bytes,
            "kernels_per_step": self.kernels,
            **{name: getattr(self, name) for name in IN_JSON},
            "epochs": config.train.steps * config.train.global_batch / config.n_cells,
            "reads_of_a_block": self.reads,
            "loader_bytes_per_s_and_node": self.loader_bytes / config.hardware.nodes,
            "encode": self.encode and self.encode.to_json(),
        }

    @property
    def reads(self) -> float:
        """Ranks that read a block."""
        config = self.config
        return reads_of_a_block(config.data.lanes, config.hardware.n_ranks, config.train.global_batch)

    @property
    def loader_bytes(self) -> float:
        """A second, over all ranks, of counts or latents in the blocks that they read."""
        config = self.config
        if is_of_latents(config):
            assert isinstance(config, PlanLDMConfig)
            cell = 4 * config.n_latents * config.latent_width
        else:
            cell = 3 * config.expressed
        return self.cells_per_s * self.reads * cell

    def table(self) -> str:
        config, hardware, cost = self.config, self.config.hardware, self.cost
        cells, batch, n_steps, N = hardware.micro_batch, config.train.global_batch, config.train.steps, hardware.n_ranks
        room = hardware.memory_gb - hardware.context_gb
        names = ("weights", "gathered", "masters", "moments", "ema", "gradients", "buckets", "activations")
        names = (*names, "validation", "peak", "host", "saved")
        lines = [
            f"{cost.n_parameters / 1e6:,.1f} million parameters. {N:,} ranks x {cells} cells x {self.accumulation} = "
            f"{batch:,} cells a step",
            f"memory of a rank in GB, of {room:g} beside what CUDA takes:",
            "  ZeRO" + "".join(f"  {name}" for name in names),
        ]
        for stage, memory in self.by_stage.items():
            numbers = memory.to_json()
            row = "".join(f"  {numbers[name] / GB:>{len(name)}.2f}" for name in names)
            mark = "  <- configured" if stage == hardware.zero_stage else ""
            lines.append(f"  {stage:>4}{row}{mark}{'' if memory.peak / GB <= room else '  DOES NOT FIT'}")
        if isinstance(config, PlanLDMConfig) and config.vae:
            lines.append("without what encoding the cells as they come takes")
        if isinstance(config, PlanLDMConfig) and preview_bytes(config):
            lines.append("validation with the most that a preview takes, but without its autoencoder")
        if config.model.attention in ("auto", "fused"):
            lines.append("activations and FLOPs are those of attention=factorised, which fused takes no more than")
        if not self.fits:
            lines.append("it does not fit. It would with " + (", or with ".join(self.remedies) or "none of our knobs"))
        formula = f" (by the formula {self.formula_flops / 1e9:,.2f} G)" if self.formula_flops else ""
        epochs = n_steps * batch / config.n_cells
        loader, read = self.cells_per_s / hardware.nodes, self.loader_bytes / hardware.nodes / 1e6
        launches = "launches (not counted for a compiled network)"
        if self.kernels is not None:
            took = f"{self.launch_s * 1e3:,.1f} ms of launching {self.kernels:,} kernels"
            launches = f"{took} in {hardware.launch_us:g} us each if that is more"
        optimizer = "the optimizer (not counted in the host's memory)"
        if self.optimizer_s is not None:
            optimizer = f"{self.optimizer_s * 1e3:,.1f} ms of the optimizer"
        lines += [
            f"FLOPs of a cell, forward and backward: {cost.flops / cells / 1e9:,.2f} G{formula}",
            f"sent by a rank in a step: {self.sent_bytes / GB:,.2f} GB",
            f"a step: {self.compute_s * 1e3:,.1f} ms of computing at {hardware.mfu:.0%} of {hardware.peak / 1e12:g} "
            f"TFLOP/s, or {launches}, {optimizer}, {self.exchange_s * 1e3:,.1f} ms of exchange"
            f"{' beside the pass' if overlaps(config) else ''}, {self.loader_s * 1e3:,.1f} ms of the loader: "
            f"{self.step_s * 1e3:,.1f} ms, bound by {self.bound_by}. A GPU is busy for {self.busy:.0%} of it",
            f"{self.cells_per_s:,.0f} cells/s, {self.cells_per_s / N:,.0f} of a GPU. {n_steps:,} steps in "
            f"{self.days:,.2f} days, {epochs:,.1f} epochs of {config.n_cells:,} cells",
            f"the loader must deliver {loader:,.0f} cells/s to a node, from {read:,.1f} MB/s of counts (3 bytes each) "
            "or latents",
            *self.of_validation(),
        ]
        if self.reads > 1:
            lines.append(
                f"as data.lanes={config.data.lanes}, a block is read by {self.reads:.3g} ranks, "
                f"and by one with data.lanes={N}"
            )
        if self.encode is not None:
            lines += self.encode.told(room)
        elif isinstance(config, PlanVAEConfig):
            lines.append("`scldm encode` is not planned, as it computes in bfloat16: give hardware.gpu")
        return "\n".join(lines)


def plan_of(config: PlanConfig) -> Plan:
    """Raises: InputError where ranks x micro-batch does not divide the global batch."""
    hardware, N = config.hardware, config.hardware.n_ranks
    accumulation = hardware.accumulation(config.train.global_batch, N)
    cost = cost_of(config)
    by_stage = {stage: memory_of(replace_hardware(config, zero_stage=stage)) for stage in stages_of(config)}
    fits = does_fit(config)
    if hardware.engine == "fsdp":
        sent = fsdp_sent_bytes(cost, hardware.zero_stage, N, accumulation)
    else:
        sent = sent_bytes(cost, hardware.zero_stage, N, accumulation, hardware.precision == "bf16")
    within = within_node(config)
    exchange_s = sent * ((1 - within) / hardware.ring + within / (GB * hardware.node_link_gb_s))
    compute_s = accumulation * cost.flops / (hardware.peak * hardware.mfu)
    kernels = None if config.model.compile else accumulation * kernels_of(config)
    launch_s = 1e-6 * hardware.launch_us * (kernels or 0)
    optimizer_s = None if hardware.offload_optimizer else OPTIMIZER_BYTES * cost.n_parameters / N / hardware.bandwidth
    pass_s = max(compute_s, launch_s)
    trained_s = (max(pass_s, exchange_s) if overlaps(config) else pass_s + exchange_s) + (optimizer_s or 0.0)
    loader_s = 0.0 if is_of_latents(config) else config.train.global_batch / N / hardware.loader_cells_s
    save_s = by_stage[hardware.zero_stage].saved / GB / hardware.host_copy_gb_s / config.train.save_every
    step_s = max(trained_s, loader_s) + save_s
    formula = 0.0
    if isinstance(config, PlanVAEConfig):
        formula = 3 * sum(
            vae_flops(config.model, hardware.micro_batch, *genes_of(config.data, config.n_genes)).values()
        )
    return Plan(
        config,
        cost,
        accumulation,
        by_stage,
        fits,
        [] if fits else [told for told, changed in remedies(config) if does_fit(changed)],
        formula / hardware.micro_batch,
        sent,
        kernels,
        launch_s,
        compute_s,
        optimizer_s,
        exchange_s,
        loader_s,
        save_s,
        step_s,
        validation_s_of(config) if config.n_validation else None,
        encode_of(config) if isinstance(config, PlanVAEConfig) else None,
    )


def validation_s_of(config: PlanConfig) -> float:
    """Seconds of a pass over the validation cells. A forward pass takes a third of what it takes with backward."""
    hardware, n_cells, cost = config.hardware, config.hardware.micro_batch, cost_of(config)
    if isinstance(config, PlanVAEConfig):
        G, bf16 = config.n_genes, hardware.precision == "bf16"
        n_cells = whole_cells(n_cells, max(genes_of(config.data, G)), G)
        cost = _vae(config.model, G, n_cells, G, G, bf16=bf16, **tiles_of(hardware))
    launch_s = 0.0 if config.model.compile else 1e-6 * hardware.launch_us * cost.kernels / 3
    forward_s = max(cost.flops / 3 / (hardware.peak * hardware.mfu), launch_s)
    return validated(config) / hardware.n_ranks / n_cells * forward_s


def validated(config: PlanConfig) -> int:
    """Cells of a validation, in whole global batches."""
    batch, most = config.train.global_batch, config.train.validation_cells or config.n_validation
    return min(config.n_validation, -(-most // batch) * batch)


def cost_of(config: PlanConfig) -> StepCost:
    """Of a micro-batch."""
    n_cells, bf16 = config.hardware.micro_batch, config.hardware.precision == "bf16"
    if isinstance(config, PlanVAEConfig):
        sizes = (config.n_genes, n_cells, *genes_of(config.data, config.n_genes))
        per_cell = sets_per_cell(config.data, config.n_genes)
        return _vae(config.model, *sizes, per_cell, bf16=bf16, **tiles_of(config.hardware))
    return _dit(config.model, config.n_latents, config.latent_width, n_cells, bf16)


def tiles_of(hardware: PlannedHardware) -> dict[str, Any]:
    """The device by whose tiles factorised attention computes."""
    return {"device": "cpu"} if hardware.gpu == "CPU" else {"device": "cuda", "memory_gb": hardware.memory_gb}


def kernels_of(config: PlanConfig) -> int:
    """Kernels of a micro-batch. Where kernels are fused, those of the plain formula are counted, few as well. They are
    not counted as tiles of `factorised`, by which memory and FLOPs are planned."""
    if isinstance(config, PlanVAEConfig) and config.model.attention not in ("plain", "sdpa", "factorised"):
        config = replace(config, model=replace(config.model, attention="plain"))
    return cost_of(config).kernels


@cache
def _dit(model: DiTConfig, n_latents: int, latent_width: int, n_cells: int, bf16: bool) -> StepCost:
    return dit_step(model, n_latents, latent_width, {}, n_cells, bf16=bf16)


def stages_of(config: PlanConfig) -> tuple[int, ...]:
    """ZeRO stages that the engine has."""
    return (2, 3) if config.hardware.engine == "fsdp" else (1, 2, 3)


def overlaps(config: PlanConfig) -> bool:
    if config.hardware.engine == "fsdp":
        return True
    chosen = config.deepspeed.get("zero_optimization", {}).get("overlap_comm")
    return config.hardware.zero_stage == 3 if chosen is None else bool(chosen)  # DeepSpeed's own default


def within_node(config: PlanConfig) -> float:
    """Share of what ZeRO-3 sends that stays on a node: of its three exchanges the gather for backward, where every
    node keeps weights whole."""
    return 1 / 3 if 1 < kept_by(config) <= config.hardware.gpus_per_node else 0.0


def kept_by(config: PlanConfig) -> int:
    """Ranks that hold the weights whole among them, besides what all ranks share (hierarchical partitioning). 1 if
    there is none."""
    kept = int(config.deepspeed.get("zero_optimization", {}).get("zero_hpz_partition_size", 1))
    return kept if config.hardware.zero_stage == 3 and config.hardware.engine != "fsdp" else 1


def memory_of(config: PlanConfig) -> Memory:
    """Of a rank, the first one's previews included."""
    found = trained_memory(config)
    of_preview = found.validation - cost_of(config).peak_bytes + preview_bytes(config)
    return replace(found, validation=max(found.validation, of_preview))


def preview_bytes(config: PlanConfig) -> float:
    """That a preview decodes cells with. How many genes the autoencoder of a second stage has, no key tells."""
    hardware = config.hardware
    if not config.train.preview_share or hardware.engine == "fsdp" or hardware.zero_stage == 3:
        return 0.0  # where weights are cut for the ranks there are none
    if isinstance(config, PlanLDMConfig):
        return PREVIEW_BYTES
    return preview_cells(config.model, config.n_genes) * cell_bytes(config.model, config.n_genes)


def trained_memory(config: PlanConfig) -> Memory:
    hardware = config.hardware
    bucket = config.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET)
    bf16, offload = hardware.precision == "bf16", hardware.offload_optimizer
    overlap, cost, kept = overlaps(config), cost_of(config), kept_by(config)
    if hardware.engine == "fsdp":
        accumulation = config.train.global_batch // (hardware.n_ranks * hardware.micro_batch)
        return fsdp_memory(cost, hardware.zero_stage, hardware.n_ranks, accumulation, offload)
    lazy = hardware.gpu == "CPU"
    found = rank_memory(cost, hardware.zero_stage, hardware.n_ranks, bf16, offload, overlap, int(bucket), lazy)
    return replace(found, weights=found.weights + 4 * cost.n_parameters / kept) if kept > 1 else found


def does_fit(config: PlanConfig) -> bool:
    return memory_of(config).peak / GB <= config.hardware.memory_gb - config.hardware.context_gb


def replace_hardware(config: PlanConfig, **changes: Any) -> PlanConfig:
    return replace(config, hardware=replace(config.hardware, **changes))


def remedies(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """Knobs that change memory and no result, each alone, each without previews where neither does alone, and then all
    together: what to say, and the config."""
    if not preview_bytes(config):
        yield from knobs(config)
        return
    *alone, together = knobs(config)
    without = replace(config, train=replace(config.train, preview_share=0.0))
    yield "train.preview_share=0", without
    yield from alone
    if not does_fit(without):
        enough = {told for told, changed in alone if does_fit(changed)}
        for told, changed in [*knobs(without)][:-1]:
            if told not in enough:
                yield f"{told} train.preview_share=0", changed
    yield together


def knobs(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """Those of training itself, as `remedies`. The last has all."""
    hardware = config.hardware
    recompute = replace(config, model=replace(config.model, recompute=True))
    if not config.model.recompute:
        yield "model.recompute=true", recompute
    smaller = max(1, hardware.micro_batch // 2)
    while smaller > 1 and not does_fit(replace_hardware(config, micro_batch=smaller)):
        smaller = max(1, smaller // 2)
    if smaller < hardware.micro_batch:
        yield f"hardware.micro_batch={smaller}", replace_hardware(config, micro_batch=smaller)
    for stage in range(hardware.zero_stage + 1, 4):
        yield f"hardware.zero_stage={stage}", replace_hardware(config, zero_stage=stage)
    if not hardware.offload_optimizer:
        yield "hardware.offload_optimizer=true", replace_hardware(config, offload_optimizer=True)
    every = replace_hardware(recompute, micro_batch=1, zero_stage=3, offload_optimizer=True)  # and so without previews
    yield "hardware.micro_batch=1 model.recompute=true hardware.zero_stage=3 hardware.offload_optimizer=true", every
