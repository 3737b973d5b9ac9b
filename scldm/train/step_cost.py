"""What a pass takes, forward alone or backward too, found by running it on tensors without storage: nothing is
computed.

The operations are those of the path that is configured, at the sizes that are configured, in tiles as for a GPU.
Reading order: StepCost, step_cost, vae_step, vae_encode, dit_step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from scldm.batch import GeneCounts
from scldm.model.dit import DiT, DiTConfig
from scldm.model.factorised import tiles
from scldm.model.vae import VAE, VAEConfig

LossOf = Callable[[nn.Module], Tensor]
SHARED = (False, False)  # genes given and asked that all cells of a micro-batch have
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_ATEN = torch.ops.aten
# torch counts attention by the kernels of a GPU alone. A trace meets the CPU's, which make the same products
FLOPS_OF = flop_registry | {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class StepCost:
    """Of one micro-batch on one rank.

    n_parameters: of the network
    linear_parameters: of those, weights and biases of linear maps, which are exchanged in bf16 where that is on
    flops: of the matrix products, forward and backward, recomputation included
    kernels: operations that compute or move numbers, forward and backward: a GPU launches at least one kernel for each
    peak_bytes: most memory at once beyond the weights, if every gradient goes as soon as it is made (ZeRO-2 and 3)
    peak_with_gradients_bytes: likewise if gradients stay
    block_parameters: of the network's `blocks`, which FSDP2 gathers one by one
    largest_block: parameters of the largest
    block_peaks: as peak_bytes, but a block's gradients stay until the block's backward pass is over, and those of no
        block to the end. The first is of what comes before a backward pass is over, the next of what comes from there
        to the end of the next one, and so on
    """

    n_parameters: int
    linear_parameters: int
    flops: int
    kernels: int
    peak_bytes: int
    peak_with_gradients_bytes: int
    block_parameters: int = 0
    largest_block: int = 0
    block_peaks: tuple[int, ...] = ()


def step_cost(
    make: Callable[[], nn.Module],
    loss_of: LossOf,
    device: Literal["cpu", "cuda"] = "cuda",
    bf16: bool = False,
    memory_gb: float = 80.0,
) -> StepCost:
    """Trace a pass of a network.

    make: the network. It is called where tensors have no storage
    loss_of: from the network to the loss. It makes its own inputs. What asks for no gradient has no backward pass
    device: whose tiles. The trace itself runs as on a CPU, since torch slices tensors of a device only where it is
    memory_gb: of a GPU, in 1e9 bytes: its tiles are a share of it
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _tiles_of(memory_gb if device == "cuda" else 0.0):
        network = make()
        linear = {id(p) for m in network.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
        sizes = [(p.numel(), id(p) in linear) for p in network.parameters()]
        blocks = [list(block.parameters()) for block in getattr(network, "blocks", ())]
        with _Watch(blocks) as watch:
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(watch.drop)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # at its end it forgets the weights that it cast
                loss = loss_of(network)
            if loss.requires_grad:
                loss.backward()
    n, n_linear = sum(n for n, _ in sizes), sum(n for n, is_linear in sizes if is_linear)
    of_blocks = [sum(p.numel() for p in block) for block in blocks]
    return StepCost(
        n_parameters=n,
        linear_parameters=n_linear,
        flops=watch.flops,
        kernels=watch.kernels,
        peak_bytes=watch.peak,
        peak_with_gradients_bytes=watch.peak_with_gradients,
        block_parameters=sum(of_blocks),
        largest_block=max(of_blocks, default=0),
        block_peaks=tuple(watch.block_peaks),
    )


def vae_step(
    config: VAEConfig,
    n_genes: int,
    n_cells: int,
    n_given: int,
    n_asked: int,
    per_cell: tuple[bool, bool] = SHARED,
    **how: Any,
) -> StepCost:
    """Of the autoencoder. What may run as `fused` is taken as `factorised`.

    per_cell: whether each cell has genes of its own, given and asked
    """
    config = _traced(config)

    def loss_of(run: nn.Module) -> Tensor:
        counts = torch.ones((n_cells, max(n_given, n_asked)), dtype=torch.int32)
        given, asked = (
            GeneCounts(torch.ones((n_cells, n) if own else n, dtype=torch.int64), counts.narrow(1, 0, n))
            for n, own in zip((n_given, n_asked), per_cell, strict=True)
        )
        noise = torch.ones(n_cells, config.n_latents, config.latent_width) if config.kl_weight > 0 else None
        posterior, predicted = run(given, asked.gene_ids, noise)
        nll_B = predicted.nll_B(asked, counts.sum(1).float())
        return (nll_B + config.kl_weight * posterior.kl_B()).sum()

    return step_cost(lambda: VAE(config, n_genes), loss_of, **how)


def vae_encode(config: VAEConfig, n_genes: int, n_cells: int, n_given: int, per_cell: bool, **how: Any) -> StepCost:
    """Of the encoder alone, forward: from counts to posterior means.

    per_cell: whether each cell has genes of its own
    """
    config = _traced(config)

    def means_of(run: nn.Module) -> Tensor:
        counts = torch.ones((n_cells, n_given), dtype=torch.int32)
        ids = torch.ones((n_cells, n_given) if per_cell else n_given, dtype=torch.int64)
        assert isinstance(run, VAE)
        with torch.no_grad():
            return run.encode(GeneCounts(ids, counts)).mean_BLZ

    return step_cost(lambda: VAE(config, n_genes), means_of, **how)


def _traced(config: VAEConfig) -> VAEConfig:
    attention = "factorised" if config.attention in ("auto", "fused") else config.attention
    return replace(config, attention=attention, compile=False)


def dit_step(
    config: DiTConfig, n_latents: int, latent_width: int, n_labels: dict[str, int], n_cells: int, **how: Any
) -> StepCost:
    """Of the diffusion transformer, without what conditions may have besides a table each: a few numbers a cell."""
    config = replace(config.portable, continuous={}, combination_tokens=False, condition_means=False)

    def loss_of(run: nn.Module) -> Tensor:
        z_BLZ = torch.ones(n_cells, n_latents, latent_width)
        labels = {name: torch.zeros(n_cells, dtype=torch.int64) for name in n_labels}
        return run(z_BLZ, torch.ones(n_cells), labels, size_B=torch.ones(n_cells)).float().square().mean()

    return step_cost(lambda: DiT(config, n_latents, latent_width, n_labels), loss_of, **how)


@contextmanager
def _tiles_of(memory_gb: float) -> Iterator[None]:
    tiles.planned_memory = int(1e9 * memory_gb)
    try:
        yield
    finally:
        tiles.planned_memory = 0


class _Watch(TorchDispatchMode):
    """Counts bytes of the storages that live at once, operations of matrix products, and kernels: what returns a new
    storage or writes into one. Views and bare allocations do neither.

    Where several gradients reach a tensor, autograd adds them in place if nothing else holds the first, though not in
    a trace. There their sum sets no peak, as what it is made of is gone by the next operation.

    blocks: parameters of each of the network's blocks
    """

    def __init__(self, blocks: list[list[nn.Parameter]]) -> None:
        super().__init__()
        self.live = self.peak = self.peak_with_gradients = self.flops = self.kernels = 0
        self.gradients = self.unsent = 0  # bytes: all that were made, and all but those of blocks that are over
        self.block_peaks = [0]
        self.known: dict[int, int] = {}
        self.missing = [{id(p) for p in block} for block in blocks]  # whose gradients are to come
        self.of_blocks = [0] * len(blocks)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = FLOPS_OF.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        inputs = {id(x.untyped_storage()) for x in _tensors((args, kwargs))}
        own = {id(x.untyped_storage()) for x in _tensors(out)}
        made = bool(own - inputs) and func._overloadpacket.__name__ not in ALLOCATIONS
        self.kernels += made or func._schema.is_mutable
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in self.known and id(storage) not in inputs:
                self.known[id(storage)] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage))
        if not (func is torch.ops.aten.add.Tensor and _adds_gradients()):
            self._look()
        return out

    def drop(self, parameter: Tensor) -> None:
        """Take the gradient that a parameter now has."""
        assert parameter.grad is not None
        n_bytes, parameter.grad = parameter.grad.untyped_storage().nbytes(), None
        self.gradients += n_bytes
        self.unsent += n_bytes
        for k, missing in enumerate(self.missing):
            if id(parameter) in missing:
                missing.remove(id(parameter))
                self.of_blocks[k] += n_bytes
                if not missing:
                    self.block_peaks.append(0)
                    self.unsent -= self.of_blocks[k]

    def _look(self) -> None:
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)
        self.block_peaks[-1] = max(self.block_peaks[-1], self.live + self.unsent)

    def _gone(self, key: int) -> None:
        self.live -= self.known.pop(key)


def _adds_gradients() -> bool:
    """Whether a sum that is made now is autograd's own: in a backward pass, neither in a pass that is made again nor in
    a function of ours."""
    if torch._C._current_graph_task_id() < 0 or torch.is_grad_enabled():
        return False
    return not isinstance(torch._C._current_autograd_node(), torch.autograd.function.BackwardCFunction)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
