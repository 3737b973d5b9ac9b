"""FSDP2, which is torch's own (`torch.distributed.fsdp.fully_shard`): many ranks without DeepSpeed.

Every rank holds some rows of each parameter, in float32, with their moments. A group of parameters is gathered before
it computes. Its gradients are summed over ranks after each micro-batch, and each rank keeps those of its rows. A group
is one of the network's `blocks`, or all of its other parameters. Those others are whole from forward to the end of
backward, as both ends of a network read them. Under zero_stage=3 a block's are whole only while it computes. Under
zero_stage=2 all stay whole from the first micro-batch of a step to the last. In bf16 a block's bf16 copies stay until
backward has used them, unless model.recompute is on.

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scldm.errors import InputError
from scldm.parallel.dist import World
from scldm.parallel.surface import (
    Autocast,
    HardwareConfig,
    OptimizerFactory,
    Piece,
    flat_moments,
    gradients_of,
    norm_of,
    set_lr,
    set_steps,
)
from scldm.tf32 import tf32_products

INSTEAD = "Install the torch of constraints.txt, or use hardware.engine=deepspeed"


class FSDPEngine:
    """Any number of ranks."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: OptimizerFactory,
        hardware: HardwareConfig,
        clip: float,
        world: World,
        global_batch: int,
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

        # of what a network returns, which nobody writes into
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        world.join(hardware.collective_timeout_s)
        on_gpu = world.device.type == "cuda"
        world.alone()
        self.world, self.clip, self.is_bf16 = world, clip, hardware.precision == "bf16"
        self.frees_blocks = hardware.zero_stage == 3
        self.accumulation, self.n_done = hardware.accumulation(global_batch, world.size), 0
        self.module: nn.Module = model.to(world.device)
        self.is_whole = False
        whole = dict(self.module.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in whole.items()}
        how: dict[str, Any] = {
            "mesh": init_device_mesh(world.device.type, (world.size,)),
            "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if hardware.offload_optimizer else OffloadPolicy(),
        }
        self.blocks: list[Any] = list(getattr(self.module, "blocks", ()))
        for block in self.blocks:
            fully_shard(block, reshard_after_forward=self.frees_blocks, **how)
        fully_shard(self.module, reshard_after_forward=False, **how)
        self.groups: list[Any] = [module for module in self.module.modules() if isinstance(module, FSDPModule)]
        for group in self.groups:  # a sum. The default divides it by the number of ranks
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies
        for name, parameter in self.module.named_parameters():
            vars(parameter).update(vars(whole[name]))  # such as a rate of its own
        # the optimizer steps plain tensors, which are the rows of this rank: no operation has to ask where others are
        self.sharded = dict(self.module.named_parameters())
        with torch.no_grad():
            self.rows = {name: nn.Parameter(_rows(parameter)) for name, parameter in self.sharded.items()}
        own = {id(parameter): self.rows[name] for name, parameter in self.sharded.items()}
        self.optimizer = make_optimizer(self.module)
        for options in self.optimizer.param_groups:
            options["params"] = [own[id(p)] for p in options["params"] if own[id(p)].numel()]
        self.model: Any = Autocast(self.module, hardware.precision, world.device)
        self.pieces = list(self._pieces())
        self.are_rows_checked = False

    def backward(self, loss: Tensor) -> None:
        self.n_done += 1
        is_last = self.n_done == self.accumulation
        for group in self.groups:
            group.set_reshard_after_backward(is_last or self.frees_blocks, recurse=False)
        with tf32_products(self.is_bf16):
            loss.backward()

    @torch.no_grad()
    def step(self, lr: float) -> float:
        assert self.n_done == self.accumulation, "a global batch has as many micro-batches as configured"
        self._check_rows()
        self.n_done = 0
        set_lr(self.optimizer, lr)
        gradients: list[Tensor] = []
        for name, parameter in self.sharded.items():
            if parameter.grad is not None and self.rows[name].numel():
                self.rows[name].grad = _rows(parameter.grad)
                gradients.append(_rows(parameter.grad))
            parameter.grad = None
        norm = self._norm(gradients)
        if math.isfinite(norm):
            if gradients:  # with many ranks, some may have no row of any parameter
                torch._foreach_mul_(gradients, min(1.0, self.clip / (norm + 1e-6)))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def bare(self, *args: Any, **kwargs: Any) -> Any:
        """`model`, after which the parameters stay whole until `gradients`."""
        for block in self.blocks:
            block.set_reshard_after_forward(False, recurse=False)
        return self.model(*args, **kwargs)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        found = gradients_of(self.module, loss)  # nothing is summed over ranks, as no parameter's `grad` is set
        for block in self.blocks:
            block.set_reshard_after_forward(self.frees_blocks, recurse=False)
        self.publish()
        return found

    def publish(self) -> None:
        for group in self.groups:  # whole parameters are gathered again where they are next needed
            group.reshard()

    def set_steps(self, n_steps: int) -> None:
        set_steps(self.optimizer, n_steps)

    def _check_rows(self) -> None:
        """Raises: InputError for a torch whose first forward pass moved the rows that the optimizer has."""
        if self.are_rows_checked:
            return
        for name, parameter in self.sharded.items():
            if _rows(parameter).numel() and _rows(parameter).data_ptr() != self.rows[name].data_ptr():
                raise InputError(
                    f"hardware.engine=fsdp: FSDP2 of torch {torch.__version__} moves {name} after the start. {INSTEAD}"
                )
        self.are_rows_checked = True

    def _norm(self, gradients: list[Tensor]) -> float:
        """Over all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if gradients:
            total += norm_of(gradients).square().to(self.world.device)
        if self.world.size > 1:
            dist.all_reduce(total)
        return math.sqrt(total.item())

    def _pieces(self) -> Iterator[Piece]:
        """The rows of this rank. Each has as many as another, but for the last ones that have any."""
        for name, rows in self.rows.items():
            shape = self.shapes[name]
            of_rank = -(-shape[0] // self.world.size) * (shape.numel() // max(shape[0], 1))
            start = self.world.rank * of_rank
            if rows.numel():
                assert start + rows.numel() == min(start + of_rank, shape.numel()), name
                weight = rows.detach().view(-1)
                yield Piece(name, start, start + rows.numel(), weight, flat_moments(self.optimizer, rows))


def _rows(sharded: Any) -> Tensor:
    """What this rank has of a DTensor: its own memory, not a copy."""
    return sharded.to_local()


def check_torch() -> None:
    """Raises: InputError for a torch whose FSDP2 can't sum gradients without dividing them."""
    from torch.distributed import fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), "set_force_sum_reduction_for_comms"):
        raise InputError(
            f"hardware.engine=fsdp: FSDP2 of torch {torch.__version__} always divides gradients by the ranks. {INSTEAD}"
        )
