"""DeepSpeed. The only place that knows it, but for its configuration's words (deepspeed_json.py)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scldm.errors import InputError
from scldm.parallel.deepspeed_json import deepspeed_json
from scldm.parallel.dist import World, wait_at_most
from scldm.parallel.surface import (
    Autocast,
    HardwareConfig,
    OptimizerFactory,
    Piece,
    flat_moments,
    gradients_of,
    set_lr,
    set_steps,
)
from scldm.tf32 import tf32_products


class DeepSpeedEngine:
    """Any number of ranks, ZeRO-1, 2 or 3."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: OptimizerFactory,
        hardware: HardwareConfig,
        clip: float,
        world: World,
        global_batch: int,
        overrides: Mapping[str, Any],
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # else it looks around, and warns
        # DeepSpeed 0.19 calls collectives by names that torch 2.13 gave up
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)
        import deepspeed

        if world.device.type == "cpu":
            # else every start compiles a C++ extension for 35 to 160 s, or dies without a compiler
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=hardware.collective_timeout_s)
        world.alone()
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        self.world, self.stage, self.is_bf16 = world, hardware.zero_stage, hardware.precision == "bf16"
        self.accumulation = hardware.accumulation(global_batch, world.size)
        self.json = deepspeed_json(
            hardware.micro_batch,
            self.accumulation,
            clip,
            hardware.zero_stage,
            hardware.precision == "bf16",
            hardware.offload_optimizer,
            overrides,
        )
        self.module: nn.Module = model.to(world.device)
        self.is_whole = hardware.zero_stage < 3
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        self.shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        optimizer = make_optimizer(self.module)
        try:
            started = deepspeed.initialize(model=self.module, optimizer=optimizer, config=self.json)
        except ValueError as error:  # pydantic's too, as for a value of the wrong type
            told = " ".join(str(error).split("For further information")[0].split())
            raise InputError(f"DeepSpeed refuses its configuration: {told}") from error
        if world.size > 1:
            wait_at_most(timeout)
        self.engine: Any = started[0]
        self.optimizer: Any = started[1]
        self.model: Any = self.engine
        self.bare: Any = Autocast(self.module, hardware.precision, world.device)
        self.pieces = list(self._pieces(names))

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the number of ranks and of micro-batches. The shares that we are given are to be added
        with tf32_products(self.is_bf16):
            self.engine.backward(loss * (self.world.size * self.accumulation))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, lr: float) -> float:
        assert self.engine.is_gradient_accumulation_boundary(), "a global batch has as many micro-batches as configured"
        set_lr(self.optimizer, lr)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        found = gradients_of(self.module, loss)
        if self.stage == 3:  # DeepSpeed ends a backward pass so where gradients are summed, which these are not
            coordinator = self.optimizer.parameter_offload.get_param_coordinator()
            coordinator.release_backward_leftovers()
            coordinator.reset_step()
        return found

    @torch.no_grad()
    def publish(self) -> None:
        of = self.optimizer
        if self.stage == 3:
            of._partition_all_parameters()
            for published, master in zip(of.fp16_partitioned_groups_flat, of.fp32_partitioned_groups_flat):
                published.copy_(master)
            of.invalidate_secondary_tensor()
            if of.persistent_parameters:  # small ones, which DeepSpeed keeps whole
                of.persistent_parameters[0].all_gather(of.persistent_parameters)
            return
        for parts, master in zip(of.parallel_partitioned_bit16_groups, of.single_partition_of_fp32_groups):
            parts[self.world.rank].copy_(master)
            if self.world.size > 1:
                dist.all_gather(list(parts), parts[self.world.rank].clone())

    def set_steps(self, n_steps: int) -> None:
        set_steps(self.optimizer.optimizer, n_steps)

    def _pieces(self, names: dict[int, str]) -> Iterator[Piece]:
        """This rank's part of every parameter, as views of DeepSpeed's flat partitions (0.19.8).

        It links the moments itself once, in the middle of the first step: only the first parameter group has any then,
        and before that step no group has. So they are made here.
        """
        optimizer, rank = self.optimizer, self.world.rank
        if self.stage == 3:
            for master, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups):
                moments, at = flat_moments(optimizer.optimizer, master), 0
                for parameter in group:  # each is cut by itself into as many parts as there are ranks
                    n = parameter.partition_numel()
                    yield from _piece(names[id(parameter)], rank * n, n, parameter.ds_numel, at, master, moments)
                    at += n
            return
        for i, master in enumerate(optimizer.single_partition_of_fp32_groups):
            moments, whole, n = flat_moments(optimizer.optimizer, master), optimizer.bit16_groups_flat[i], len(master)
            for parameter in optimizer.bit16_groups[i]:  # all of a group are cut at once
                at = (parameter.data_ptr() - whole.data_ptr()) // whole.element_size() - rank * n
                start = max(0, -at)
                yield from _piece(
                    names[id(parameter)], start, n - (at + start), parameter.numel(), at + start, master, moments
                )


def _piece(
    name: str, start: int, room: int, n: int, at: int, master: Tensor, moments: dict[str, Tensor]
) -> Iterator[Piece]:
    """What begins at `start` of a parameter of n numbers, and at `at` of a partition, if there is any of it."""
    stop = min(start + room, n)
    if start < stop:
        part = slice(at, at + stop - start)
        yield Piece(name, start, stop, master.detach()[part], {k: moment[part] for k, moment in moments.items()})
