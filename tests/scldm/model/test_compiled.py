"""`model.compile`: which graphs the blocks make, whatever compiles them, and that the compiled network is the same.

The trace over a GPU by name can't hold them: torch.compile refuses the mode that counts launches.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scldm.batch import GeneCounts
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, VAEConfig

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]  # torch.compile warns of itself
VAE_SHAPE = VAEConfig(width=16, n_latents=4, latent_width=8, n_layers=2, n_heads=2)
DIT_SHAPE = DiTConfig(width=16, n_layers=3, n_heads=2)


def outcome(network: VAE | DiT, n: int) -> list[Tensor]:
    """What it returns of n cells, and its gradients."""
    generator = torch.Generator().manual_seed(n)
    if isinstance(network, VAE):
        given = GeneCounts(torch.arange(1, 21), torch.randint(0, 5, (n, 20), generator=generator))
        posterior, predicted = network(given, given.gene_ids)
        out = [posterior.mean_BLZ, predicted.value_BQ]
    else:
        z_BLZ = torch.randn(n, 4, 8, generator=generator, dtype=torch.float64)
        out = [network(z_BLZ, torch.rand(n, generator=generator).double(), {"type": torch.arange(n) % 3})]
    network.zero_grad()
    sum(x.square().sum() for x in out).backward()  # pyright: ignore[reportAttributeAccessIssue]
    return [x.detach() for x in out] + [p.grad for p in network.parameters() if p.grad is not None]


def made(kind: str, compiled: bool) -> VAE | DiT:
    torch.manual_seed(0)
    if kind == "vae":
        return VAE(replace(VAE_SHAPE, compile=compiled), 30).double()
    dit = DiT(replace(DIT_SHAPE, compile=compiled), 4, 8, {"type": 3}).double()
    with torch.no_grad():
        for parameter in dit.parameters():  # away from their start, at which every block is the identity
            parameter += 0.1 * torch.randn_like(parameter)
    return dit


@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_all_blocks_are_one_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a break, shared by all blocks, and a second one for all further micro-batches' sizes."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    plain, compiled = made(kind, compiled=False), made(kind, compiled=True)
    for n, most in ((5, 1), (6, 2), (7, 2)):
        for x, y in zip(outcome(compiled, n), outcome(plain, n), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        assert 1 <= len(graphs) <= most, f"{len(graphs)} graphs after {n} cells"
    torch._dynamo.reset()


@pytest.mark.exhaustive  # torch compiles for a minute
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_the_compiled_network_is_the_same(kind: str) -> None:
    plain, compiled = made(kind, compiled=False), made(kind, compiled=True)
    for x, y in zip(outcome(compiled, 5), outcome(plain, 5), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
