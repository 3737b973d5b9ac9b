"""What `attention=auto` is, by device, precision and shape; and that on a CPU it is `factorised` to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.ways import of_preset
from scldm.batch import GeneCounts
from scldm.errors import InputError
from scldm.model import vae
from scldm.model.attention import fastest
from scldm.model.blocks import hidden_width
from scldm.model.factorised import tiles, unpooling
from scldm.model.gene_rows import GeneRows
from scldm.model.vae import VAE, VAEConfig, chosen

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = VAEConfig(width=256, n_latents=64, n_heads=4)
MANY_PAIRS = replace(SHAPE, decoder_cross_heads=4)  # 256 pairs of a head and a latent token: too many for a kernel
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU with triton; the answer is kept, so what other tests asked is forgotten."""
    monkeypatch.setattr(vae, "check_available", lambda device: None)
    vae._refusal.cache_clear()
    yield
    vae._refusal.cache_clear()


@pytest.mark.parametrize(
    "device, dtype, shape, way",
    [
        (CPU, FP32, SHAPE, "factorised"),
        (CPU, BF16, SHAPE, "factorised"),
        (CUDA, BF16, SHAPE, "fused"),
        (CUDA, FP32, SHAPE, "factorised"),
        (CUDA, BF16, MANY_PAIRS, "factorised"),
        (torch.device("mps"), BF16, SHAPE, "factorised"),
    ],
)
def test_the_rule(device, dtype, shape, way, kernels_run) -> None:
    assert chosen(shape, device, dtype).way == way


def test_without_kernels_a_gpu_takes_the_other_way_and_says_why(monkeypatch: pytest.MonkeyPatch, kernels_run) -> None:
    def refuse(device: torch.device) -> None:
        raise InputError("the package triton is not installed")

    monkeypatch.setattr(vae, "check_available", refuse)
    assert str(chosen(SHAPE, CUDA, BF16)) == "factorised (the package triton is not installed)"
    assert "at most 128, not 256" in chosen(MANY_PAIRS, CUDA, BF16).why
    assert fastest("cuda", FP32, "").why == "the fastest on cuda in float32"


def test_what_is_named_is_taken(kernels_run) -> None:
    for way in ("plain", "sdpa", "factorised", "fused"):
        assert chosen(replace(SHAPE, attention=way), CPU, FP32).way == way


def test_on_a_cpu_the_default_gives_the_bits_of_factorised() -> None:
    shape = VAEConfig(width=32, n_latents=6, n_layers=1)
    assert shape.attention == "auto"
    assert replace(shape, attention="plain").portable.attention == "auto"
    given = GeneCounts(torch.arange(1, 41), torch.randint(0, 9, (5, 40)))
    found = []
    for attention in ("auto", "factorised"):
        torch.manual_seed(0)
        network = VAE(replace(shape, attention=attention), 50)
        posterior, predicted = network(given, given.gene_ids)
        predicted.nll_B(given, given.counts_BS.sum(1).float()).sum().backward()
        found.append([posterior.mean_BLZ, predicted.value_BQ, *(p.grad for p in network.parameters())])
    assert all(torch.equal(auto, named) for auto, named in zip(*found, strict=True))


def test_a_gpus_tiles_are_a_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    like = SimpleNamespace(device=CUDA, element_size=lambda: 2)
    for memory in (16_000_000_000, 80_000_000_000):
        there = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, there=there: there)
        assert tiles.tile_numbers(like) == memory // 64 // 2
    assert tiles.tile_numbers(torch.zeros(1)) == tiles.TILE_CPU


@pytest.mark.parametrize("cells, most", [(1, 1), (32, 1), (128, 3)])
def test_a_gpu_takes_the_genes_in_few_tiles(cells: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 genes of a network of width 256, on 80 GB: each tile is 28 launches. All genes of all cells, once."""
    monkeypatch.setattr(tiles, "planned_memory", 80_000_000_000)
    r_BQ, T_QF = torch.empty(cells, 8192, device="meta"), torch.empty(8192, 1376, dtype=BF16, device="meta")
    found = [(cells, genes) for cells, genes, *_ in unpooling._cell_gene_tiles(r_BQ, T_QF)]
    assert len(found) <= most
    seen = torch.zeros(cells, 8192, dtype=torch.int64)
    for some, genes in found:
        seen[some, genes] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("preset", "cells", "n_genes", "vocabulary", "pays"),
    [("tiny", 30, 422, 1_268, True), ("20m", 32, 2_048, 20_001, True), ("20m", 4, 8_192, 20_001, False)],
)
def test_a_table_of_the_first_product_pays_where_cells_hold_a_gene_several_times(
    preset: str, cells: int, n_genes: int, vocabulary: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured on a CPU. On a GPU it would be launches for each cell."""
    shape = of_preset(preset, SHAPE)
    rows = GeneRows(torch.empty(vocabulary, shape.width, device="meta"), None, torch.Size((cells, n_genes)))
    x_BLD = torch.empty(cells, shape.n_latents, shape.width, device="meta")
    hidden = hidden_width(shape.width)
    assert unpooling.pays_by_table(rows, x_BLD, shape.decoder_cross_heads, hidden) == pays
    monkeypatch.setattr(tiles, "planned_memory", 80_000_000_000)
    assert not unpooling.pays_by_table(rows, x_BLD, shape.decoder_cross_heads, hidden)
