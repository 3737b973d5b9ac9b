"""What all engines show the training loop, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from scldm.checked import Checked, checked
from scldm.errors import InputError
from scldm.micro_batches import accumulation

MOMENTS = ("exp_avg", "exp_avg_sq")
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class HardwareConfig(Checked):
    """How the work is laid on the machine: speed and memory, never the result.

    engine: deepspeed, fsdp (torch's FSDP2, which does without DeepSpeed), plain (torch alone, one process), or auto.
        auto is plain for one process on a CPU, where it takes less time, unless offload_optimizer or a key of deepspeed
        is given. Else it is deepspeed
    micro_batch: cells per rank and forward pass. ranks x micro_batch x accumulation is the global batch
    zero_stage: what is sharded over the ranks: 1 optimizer states and EMA, 2 gradients too, 3 weights too. As 3 gathers
        them around every layer, model.compile gains nothing there under DeepSpeed. fsdp has 2 and 3, and gathers around
        every block
    offload_optimizer: keep master weights, moments and EMA in the host's memory, and step there
    precision: fp32, or bf16 (autocast, master weights stay float32). On an NVIDIA GPU bf16 has TF32 beside it.
        Float32 products of backward take it. Forward, only those of what depends on the gene or the latent token alone
        do. fp32 takes TF32 nowhere
    threads: CPU threads per rank for torch
    peak_tflops: of a rank's device at the precision, dense, for MFU. 0 takes that of a GPU known by its name
    require_gpu: refuse to train on CPUs. Presets for GPUs set it
    collective_timeout_s: longest wait of a rank for the others within one exchange, in seconds. It is at least a minute
        more than train.hang_s
    """

    engine: Literal["auto", "deepspeed", "fsdp", "plain"] = "auto"
    micro_batch: int = checked(128, at_least=1)
    zero_stage: int = checked(2, at_least=1, at_most=3)
    offload_optimizer: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = checked(1, at_least=1)
    peak_tflops: float = checked(0.0, at_least=0)
    require_gpu: bool = False
    collective_timeout_s: int = checked(1_800, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "fsdp" and self.zero_stage == 1:
            raise InputError(
                "hardware.zero_stage=1: hardware.engine=fsdp shards gradients and weights too. Give "
                "hardware.zero_stage=2 (weights stay whole from forward to backward) or 3"
            )

    def accumulation(self, global_batch: int, n_ranks: int) -> int:
        """Micro-batches per rank and optimizer step.

        Raises: InputError where ranks x micro_batch does not divide the global batch, with the nearest values that
        would, or for an engine that can't run on so many.
        """
        if self.engine == "plain" and n_ranks > 1:
            raise InputError(f"hardware.engine=plain runs on one rank, not {n_ranks}. deepspeed and fsdp run on many")
        return accumulation(global_batch, n_ranks, self.micro_batch)


@dataclass(frozen=True)
class Piece:
    """What a rank holds of one parameter: the numbers from `start` to `stop` of it, flattened.

    weight: the float32 master weights, (stop - start,). A view that training changes
    moments: the optimizer's, by name. Views likewise
    """

    name: str
    start: int
    stop: int
    weight: Tensor
    moments: dict[str, Tensor]


class Engine(Protocol):
    """What the training loop sees."""

    model: Any  # called for the forward pass, in validation too
    bare: Any  # the same forward pass, of which `gradients` tells the gradients
    module: nn.Module  # the bare network, whose parameters may be empty between forward passes (ZeRO-3)
    is_whole: bool  # whether a rank can call the network by itself, and any part of it
    shapes: dict[str, torch.Size]  # of the parameters, whole, by name
    pieces: list[Piece]  # what this rank holds. Those of all ranks make every parameter once

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's share of the global mean. Shares add up over micro-batches and ranks."""
        ...

    def step(self, lr: float) -> float:
        """One clipped optimizer step on the accumulated gradients. Returns their norm before clipping.

        A norm that is not finite is so on every rank, and the step was not made on any.
        """
        ...

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Of a loss of `bare`, by parameter: this rank's alone, for the caller to look at. No step uses them.
        Collective."""
        ...

    def publish(self) -> None:
        """Compute with the master weights as they are now, on all ranks, after a change to pieces. Collective."""
        ...

    def set_steps(self, n_steps: int) -> None:
        """Tell the optimizer how many steps its moments have seen."""
        ...


class Autocast(nn.Module):
    """The module under autocast, as DeepSpeed's engine runs it."""

    def __init__(self, module: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.module, self.enabled, self.kind = module, precision == "bf16", device.type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.kind, torch.bfloat16) if self.enabled else nullcontext():
            return self.module(*args, **kwargs)


def gradients_of(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def norm_of(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all of them, float64, as DeepSpeed takes it.

    On a CPU row by row: torch's float32 norm of one table of 36,130 genes x 256 is 6e-4 too small there. A clipped step
    would then depend on the engine, and so on the number of ranks."""
    if any(gradient.device.type != "cpu" for gradient in gradients):
        return torch.stack(torch._foreach_norm(gradients)).double().norm()
    rows = [torch.linalg.vector_norm(g, dim=-1) if g.ndim > 1 else g for g in gradients]
    return torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows]).norm()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_steps(optimizer: torch.optim.Optimizer, n_steps: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(float(n_steps))


def flat_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Views of a parameter's moments, which are made here before AdamW would in its first step."""
    state = optimizer.state[parameter]
    if not state:
        zeros = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
        fused = any(group.get("fused") for group in optimizer.param_groups)  # whose kernel reads the step where it runs
        state |= {"step": torch.zeros((), device=parameter.device if fused else "cpu"), **zeros}
    return {moment: state[moment].view(-1) for moment in MOMENTS}
