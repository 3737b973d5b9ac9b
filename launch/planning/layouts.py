"""The same training on fewer nodes, at other ZeRO stages and micro-batches, with one recommended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launch.planning.config import PlanConfig
from launch.planning.plan import Plan, does_fit, plan_of, replace_hardware, stages_of

# Of layouts that reach so much of the fastest one's cells/s, the simplest is as good. A plan knows no better, and does
# not count the launches by which ZeRO-3 gathers weights.
NEAR = 0.9
WORTH = 0.5  # a GPU among many shall do at least so much of what it does in the best layout


def compared(plan: Plan) -> list[Plan]:
    """The best layout that fits for each number of nodes: the configured one, halved each time. It is sought over ZeRO
    stages, and micro-batches up to four times the configured one. The recommended one comes first."""
    config, best = plan.config, []
    nodes = config.hardware.nodes
    while nodes:
        found = [
            plan_of(laid)
            for micro_batch in sorted({max(1, config.hardware.micro_batch * k // 2) for k in (1, 2, 4, 8)})
            for stage in stages_of(config)
            if config.train.global_batch % (micro_batch * nodes * config.hardware.gpus_per_node) == 0
            and does_fit(laid := laid_out(config, nodes, stage, micro_batch))
        ]
        best += simplest(found)
        nodes //= 2
    if not best:
        return []
    most = max(other.cells_per_gpu for other in best)
    worth = [other for other in best if other.cells_per_gpu >= WORTH * most]
    (recommended,) = simplest(worth)
    return [recommended, *(other for other in best if other is not recommended)]


def simplest(layouts: Sequence[Plan]) -> list[Plan]:
    """Of those nearly as fast as the fastest, that with the fewest nodes and the lowest ZeRO stage. Empty for none."""
    fast = NEAR * max((layout.cells_per_s for layout in layouts), default=0.0)
    near = [layout for layout in layouts if layout.cells_per_s >= fast]
    hardware = [layout.config.hardware for layout in near]
    order = [(h.nodes, h.zero_stage, -round(layout.cells_per_s, -1)) for h, layout in zip(hardware, near)]
    return near[order.index(min(order)) :][:1] if near else []


def laid_out(config: PlanConfig, nodes: int, stage: int, micro_batch: int) -> PlanConfig:
    zero = config.deepspeed.get("zero_optimization", {})
    kept = {key: value for key, value in zero.items() if key != "zero_hpz_partition_size" or stage == 3}
    if zero != kept:
        config = replace(config, deepspeed={**config.deepspeed, "zero_optimization": kept})
    return replace_hardware(config, nodes=nodes, zero_stage=stage, micro_batch=micro_batch)


def comparison(plan: Plan, others: Sequence[Plan]) -> list[str]:
    """The table of other layouts, and what nodes are wasted."""
    if not others:
        return []
    names = ("nodes", "GPUs", "ZeRO", "micro-batch", "GB", "cells/s", "of a GPU", "busy", "days", "GPU days")
    lines = ["other layouts of the same training, the recommended one first:", "  " + "  ".join(names)]
    for other in others:
        cells = (f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" for value in other.row().values())
        row = "  ".join(f"{cell:>{len(name)}}" for cell, name in zip(cells, names, strict=True))
        lines.append(f"  {row}{'  <- recommended' if other is others[0] else ''}")
    wasted = plan.cells_per_gpu / max(other.cells_per_gpu for other in others)
    if wasted < WORTH:
        lines.append(
            f"{plan.config.hardware.nodes} nodes are wasted on it: a GPU does {wasted:.0%} of what it does in the best "
            f"layout, as a step is bound by {plan.bound_by}"
        )
    return lines
