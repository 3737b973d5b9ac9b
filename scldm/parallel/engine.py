"""The engine turns micro-batch losses into an optimizer step, over all ranks. The only place that knows DeepSpeed.

Two engines with one surface: DeepSpeedEngine, which users run, and PlainEngine, a lone process without it, which is
also what the other is tested against. Both hold float32 master weights. bf16 is autocast around the forward pass.
Reading order: HardwareConfig, Piece, the engines, check_engine, start_engine.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scldm.checked import Checked, checked
from scldm.errors import InputError
from scldm.micro_batches import accumulation
from scldm.parallel.deepspeed_json import deepspeed_json
from scldm.parallel.dist import World, wait_at_most
from scldm.tf32 import tf32_products

# the version whose private names stand below. 0.19.0 lacks one of them. pyproject.toml and constraints.txt say the same
DEEPSPEED = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class HardwareConfig(Checked):
    """How the work is laid on the machine: speed and memory, never the result.

    engine: deepspeed, plain (torch alone, one process), or auto. auto is plain for one process on a CPU, where it
        takes less time, unless offload_optimizer or a key of deepspeed is given. Else it is deepspeed
    micro_batch: cells per rank and forward pass. ranks x micro_batch x accumulation is the global batch
    zero_stage: what DeepSpeed shards over the ranks: 1 optimizer states and EMA, 2 gradients too, 3 weights too.
        As 3 gathers them around every layer, model.compile gains nothing there
    offload_optimizer: keep master weights, moments and EMA in the host's memory, and step there
    precision: fp32, or bf16 (autocast, master weights stay float32). On an NVIDIA GPU bf16 has TF32 beside it: float32
        products of backward take it, and forward those of what depends on the gene or the latent token alone. fp32
        takes TF32 nowhere
    threads: CPU threads per rank for torch
    peak_tflops: of a rank's device at the precision, dense, for MFU; 0 takes that of a GPU known by its name
    require_gpu: refuse to train on CPUs. Presets for GPUs set it
    collective_timeout_s: longest wait of a rank for the others within one exchange, in seconds; a minute more than
        train.hang_s at least
    """

    engine: Literal["auto", "deepspeed", "plain"] = "auto"
    micro_batch: int = checked(128, at_least=1)
    zero_stage: int = checked(2, at_least=1, at_most=3)
    offload_optimizer: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = checked(1, at_least=1)
    peak_tflops: float = checked(0.0, at_least=0)
    require_gpu: bool = False
    collective_timeout_s: int = checked(1_800, at_least=1)

    def accumulation(self, global_batch: int, n_ranks: int) -> int:
        """Micro-batches per rank and optimizer step.

        Raises: InputError where ranks x micro_batch does not divide the global batch, with the nearest values that
        would, or for an engine that can't run on so many.
        """
        if self.engine == "plain" and n_ranks > 1:
            raise InputError(f"hardware.engine=plain runs on one rank, not on {n_ranks}. deepspeed runs on many")
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
        Collective under ZeRO-3."""
        ...

    def publish(self) -> None:
        """Compute with the master weights as they are now, on all ranks, after a change to pieces. Collective."""
        ...

    def set_steps(self, n_steps: int) -> None:
        """Tell the optimizer how many steps its moments have seen."""
        ...


class PlainEngine:
    """One process, plain torch."""

    def __init__(
        self, model: nn.Module, make_optimizer: OptimizerFactory, hardware: HardwareConfig, clip: float, world: World
    ) -> None:
        self.module: nn.Module = model.to(world.device)
        self.optimizer = make_optimizer(self.module)
        self.clip = clip
        self.model: Any = _Autocast(self.module, hardware.precision, world.device)
        self.bare: Any = self.model
        self.is_bf16 = hardware.precision == "bf16"
        self.shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        self.pieces = [
            Piece(name, 0, p.numel(), p.detach().view(-1), _flat_moments(self.optimizer, p))
            for name, p in self.module.named_parameters()
        ]

    def backward(self, loss: Tensor) -> None:
        with tf32_products(self.is_bf16):
            loss.backward()

    def step(self, lr: float) -> float:
        _set_lr(self.optimizer, lr)
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        return _gradients(self.module, loss)

    def publish(self) -> None:
        pass  # the pieces are the parameters

    def set_steps(self, n_steps: int) -> None:
        _set_steps(self.optimizer, n_steps)


class _Autocast(nn.Module):
    """The module under autocast, as DeepSpeed's engine runs it."""

    def __init__(self, module: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.module, self.enabled, self.kind = module, precision == "bf16", device.type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.kind, torch.bfloat16) if self.enabled else nullcontext():
            return self.module(*args, **kwargs)


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
        self.bare: Any = _Autocast(self.module, hardware.precision, world.device)
        self.pieces = list(self._pieces(names))

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the number of ranks and of micro-batches. The shares that we are given are to be added
        with tf32_products(self.is_bf16):
            self.engine.backward(loss * (self.world.size * self.accumulation))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, lr: float) -> float:
        assert self.engine.is_gradient_accumulation_boundary(), "a global batch has as many micro-batches as configured"
        _set_lr(self.optimizer, lr)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        found = _gradients(self.module, loss)
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
        _set_steps(self.optimizer.optimizer, n_steps)

    def _pieces(self, names: dict[int, str]) -> Iterator[Piece]:
        """This rank's part of every parameter, as views of DeepSpeed's flat partitions (0.19.8).

        It links the moments itself once, in the middle of the first step: only the first parameter group has any then,
        and before that step no group has. So they are made here.
        """
        optimizer, rank = self.optimizer, self.world.rank
        if self.stage == 3:
            for master, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups):
                moments, at = _flat_moments(optimizer.optimizer, master), 0
                for parameter in group:  # each is cut by itself into as many parts as there are ranks
                    n = parameter.partition_numel()
                    yield from _piece(names[id(parameter)], rank * n, n, parameter.ds_numel, at, master, moments)
                    at += n
            return
        for i, master in enumerate(optimizer.single_partition_of_fp32_groups):
            moments, whole, n = _flat_moments(optimizer.optimizer, master), optimizer.bit16_groups_flat[i], len(master)
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


def check_engine(hardware: HardwareConfig, world: World, overrides: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed is what runs.

    Raises: InputError where it is, and another version is installed, or none; and for a CPU where a GPU is required.
    """
    if hardware.require_gpu and world.device.type == "cpu":
        raise InputError(
            "hardware.require_gpu=true: torch finds no GPU here; give hardware.require_gpu=false to train on the CPU"
        )
    alone_on_a_cpu = world.size == 1 and world.device.type == "cpu" and not overrides and not hardware.offload_optimizer
    if hardware.engine == "plain" or (hardware.engine == "auto" and alone_on_a_cpu):
        return False
    try:
        found = metadata.version("deepspeed").partition("+")[0]
    except metadata.PackageNotFoundError:
        found = "not installed"
    if found != DEEPSPEED:
        raise InputError(
            f"deepspeed is {found}, and scldm reads private parts of {DEEPSPEED} that other versions name otherwise: "
            f"pip install deepspeed=={DEEPSPEED}, or use hardware.engine=plain on one rank"
        )
    return True


def start_engine(
    model: nn.Module,
    make_optimizer: OptimizerFactory,
    hardware: HardwareConfig,
    clip: float,
    world: World,
    global_batch: int,
    overrides: Mapping[str, Any] | None = None,
) -> PlainEngine | DeepSpeedEngine:
    """The configured engine around a network. Collective.

    overrides: of DeepSpeed's own configuration, as `deepspeed.KEY=value` gives them

    Raises: InputError where ranks, micro-batch and global batch do not fit, an override would change the result, or
    another version of DeepSpeed is installed than the one that this works with.
    """
    hardware.accumulation(global_batch, world.size)
    if check_engine(hardware, world, overrides or {}):
        return DeepSpeedEngine(model, make_optimizer, hardware, clip, world, global_batch, overrides or {})
    return PlainEngine(model, make_optimizer, hardware, clip, world)


def _gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _set_steps(optimizer: torch.optim.Optimizer, n_steps: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(float(n_steps))


def _flat_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Views of a parameter's moments, which are made here before AdamW would in its first step."""
    state = optimizer.state[parameter]
    if not state:
        zeros = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
        fused = any(group.get("fused") for group in optimizer.param_groups)  # whose kernel reads the step where it runs
        state |= {"step": torch.zeros((), device=parameter.device if fused else "cpu"), **zeros}
    return {moment: state[moment].view(-1) for moment in MOMENTS}
