"""The engine turns micro-batch losses into an optimizer step, over all ranks. The only place that knows DeepSpeed.

Two engines with one surface: DeepSpeedEngine, which users run, and PlainEngine, a lone process without it, which is
also what the other is tested against. Both hold float32 master weights; bf16 is autocast around the forward pass.
Reading order: HardwareConfig, the engines, deepspeed_json, start_engine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from scldm.errors import InputError
from scldm.parallel.dist import World

MOMENTS = ("exp_avg", "exp_avg_sq")
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class HardwareConfig:
    """How the work is laid on the machine: speed and memory, never the result.

    engine: deepspeed, or plain for one process without it
    micro_batch: cells per rank and forward pass; ranks x micro_batch x accumulation is the global batch
    zero_stage: what DeepSpeed shards over the ranks: 1 optimizer states, 2 gradients too
    precision: fp32, or bf16 (autocast; master weights stay float32)
    threads: CPU threads per rank for torch
    """

    engine: Literal["deepspeed", "plain"] = "deepspeed"
    micro_batch: int = 128
    zero_stage: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.zero_stage not in (1, 2):
            raise InputError(f"hardware.zero_stage={self.zero_stage}: it must be 1 or 2")
        for name in ("micro_batch", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"hardware.{name}={getattr(self, name)} must be at least 1")

    def accumulation(self, global_batch: int, n_ranks: int) -> int:
        """Micro-batches per rank and optimizer step.

        Raises: InputError where ranks x micro_batch does not divide the global batch, with values that would.
        """
        if global_batch % (n_ranks * self.micro_batch) == 0:
            return global_batch // (n_ranks * self.micro_batch)
        if global_batch % n_ranks:
            raise InputError(
                f"train.global_batch={global_batch} can't be split over {n_ranks} ranks; "
                f"the nearest that can is {max(n_ranks, round(global_batch / n_ranks) * n_ranks)}"
            )
        per_rank = global_batch // n_ranks
        fitting = [m for m in range(1, per_rank + 1) if per_rank % m == 0]
        raise InputError(
            f"hardware.micro_batch={self.micro_batch} on {n_ranks} ranks does not divide "
            f"train.global_batch={global_batch}; micro-batches that do: {', '.join(map(str, fitting))}"
        )


class Engine(Protocol):
    """What the training loop sees."""

    model: Any  # called for the forward pass
    module: nn.Module  # the bare network, whose named parameters are float32 and whole

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's share of the global mean; shares add up over micro-batches and ranks."""
        ...

    def step(self, lr: float) -> float:
        """One clipped optimizer step on the accumulated gradients; returns their norm before clipping."""
        ...

    def autocast(self) -> AbstractContextManager:
        """The precision of a forward pass outside `model`, as in validation."""
        ...

    def optimizer_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(parameter name, its moments), whole, on the CPU; collective: every rank must exhaust it."""
        ...

    def load(self, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]], step: int) -> None:
        """Take weights and moments by parameter name, and the number of steps made."""
        ...


class PlainEngine:
    """One process, plain torch."""

    def __init__(
        self, model: nn.Module, make_optimizer: OptimizerFactory, hardware: HardwareConfig, clip: float, world: World
    ) -> None:
        if world.size > 1:
            raise InputError(f"hardware.engine=plain runs on one rank, not on {world.size}; deepspeed runs on many")
        self.module: nn.Module = model.to(world.device)
        self.optimizer = make_optimizer(self.module)
        self.clip = clip
        self.precision, self.device = hardware.precision, world.device
        self.model: Any = _Autocast(self.module, self.autocast)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        _set_lr(self.optimizer, lr)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def autocast(self) -> AbstractContextManager:
        return _autocast(self.precision, self.device)

    def optimizer_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.module.named_parameters():
            state = self.optimizer.state[parameter]
            yield name, {moment: state[moment].cpu() for moment in MOMENTS}

    def load(self, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]], step: int) -> None:
        _load_weights(self.module, weights)
        for name, parameter in self.module.named_parameters():
            state = {moment: value.to(parameter.device, copy=True) for moment, value in moments[name].items()}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}


class _Autocast(nn.Module):
    """The module under autocast, as DeepSpeed's engine runs it."""

    def __init__(self, module: nn.Module, autocast: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.module, self.autocast = module, autocast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            return self.module(*args, **kwargs)


class DeepSpeedEngine:
    """Any number of ranks, ZeRO-1 or 2."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: OptimizerFactory,
        hardware: HardwareConfig,
        clip: float,
        world: World,
        global_batch: int,
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # else it looks around, and warns
        # DeepSpeed 0.19 calls a collective by the name that torch 2.13 gave up
        warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
        import deepspeed
        from deepspeed import utils

        if world.device.type == "cpu":
            # else every start compiles a C++ extension for 35 to 160 s, or dies without a compiler
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)
        self.utils, self.world = utils, world
        self.precision = hardware.precision
        self.accumulation = hardware.accumulation(global_batch, world.size)
        self.json = deepspeed_json(hardware, clip, self.accumulation)
        self.module: nn.Module = model.to(world.device)
        started = deepspeed.initialize(model=self.module, optimizer=make_optimizer(self.module), config=self.json)
        self.engine: Any = started[0]
        self.optimizer: Any = started[1]
        self.model: Any = self.engine

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the number of ranks and of micro-batches; the shares that we are given are to be added
        self.engine.backward(loss * (self.world.size * self.accumulation))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, lr: float) -> float:
        assert self.engine.is_gradient_accumulation_boundary(), "a global batch has as many micro-batches as configured"
        _set_lr(self.optimizer, lr)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def autocast(self) -> AbstractContextManager:
        return _autocast(self.precision, self.world.device)

    def optimizer_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        self._link_moments()
        for name, parameter in self.module.named_parameters():
            yield name, {m: self.utils.safe_get_full_optimizer_state(parameter, m).cpu() for m in MOMENTS}

    def load(self, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]], step: int) -> None:
        _load_weights(self.module, weights)
        self._link_moments()
        for name, parameter in self.module.named_parameters():
            self.utils.safe_set_full_fp32_param(parameter, weights[name])
            for moment, value in moments[name].items():
                self.utils.safe_set_full_optimizer_state(parameter, value, moment)
        for state in self.optimizer.optimizer.state.values():
            state["step"] = torch.tensor(float(step))

    def _link_moments(self) -> None:
        """Let DeepSpeed find the moments of every parameter in its flat partitions.

        It links them itself once, in the middle of the first step (0.19.8): only the first parameter group has any
        then, and before that step no group has.
        """
        for flat in self.optimizer.single_partition_of_fp32_groups:
            state = self.optimizer.optimizer.state[flat]
            if not state:
                state |= {"step": torch.tensor(0.0), **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()


def deepspeed_json(hardware: HardwareConfig, clip: float, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, as kept in the run folder."""
    return {
        "train_micro_batch_size_per_gpu": hardware.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": hardware.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: FusedAdam and CPUAdam need a compiler at start
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": hardware.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 1_000_000_000,
    }


def start_engine(
    model: nn.Module,
    make_optimizer: OptimizerFactory,
    hardware: HardwareConfig,
    clip: float,
    world: World,
    global_batch: int,
) -> PlainEngine | DeepSpeedEngine:
    """The configured engine around a network; collective.

    Raises: InputError where ranks, micro-batch and global batch do not fit.
    """
    hardware.accumulation(global_batch, world.size)
    if hardware.engine == "plain":
        return PlainEngine(model, make_optimizer, hardware, clip, world)
    return DeepSpeedEngine(model, make_optimizer, hardware, clip, world, global_batch)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])


def _autocast(precision: str, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
