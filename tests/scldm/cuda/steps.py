"""What each step of the product launches on a GPU and waits for. Imported once `named.pretend` was called."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import launch.encode as encode_verb
import scldm.kernels.deviation as deviation_kernels
import scldm.kernels.pool as pool_kernels
import scldm.kernels.unpool as unpool_kernels
from benchmarks.ways import of_preset
from scldm.batch import CompactCellBatch, CompactCounts, LatentBatch
from scldm.flow.sampler import SamplerConfig
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE
from scldm.parallel.dist import World
from scldm.parallel.engine import HardwareConfig, PlainEngine
from scldm.pretrained import Pretrained
from scldm.train.ema import EMA
from scldm.train.losses import Draws, GuidanceConfig, LDMStage, VAEStage
from scldm.train.optim import OptimConfig, make_optimizer
from scldm.train.throughput import Meter
from scldm.vocab import ConditionVocab, GeneVocab
from tests.scldm.cuda.named import ACTIVE, Counts, watched, without_storage

GPU = World(0, 1, torch.device("cuda", 0))
G, S = 36_130, 8_192  # of the Census, and of the presets
FOUND: dict[str, Any] = {}

for module in (deviation_kernels, pool_kernels, unpool_kernels):
    module.launch = lambda *_, **__: ACTIVE[-1].launched()


def note(name: str, counts: Counts) -> None:
    most = dict(counts.by_line.most_common(40))
    FOUND[name] = {"kernels": counts.kernels, "waits": counts.waits, "sdpa": counts.sdpa, "by_line": most}


def rest(B: int) -> dict[str, Any]:
    labels = {name: torch.zeros(B, dtype=torch.int64) for name in ("type", "donor")}
    identity = {"cell_ids_B2": torch.zeros(B, 2, dtype=torch.int64), "positions_B": torch.arange(B), "n_cells": 1_024}
    return {"library_size_all_B": torch.ones(B), "weight_B": torch.ones(B), "conditions": labels, **identity}


def cells(B: int, own: bool, n_given: int = S, n_asked: int = S) -> CompactCellBatch:
    X = 2_000 * B
    where, counts = torch.zeros(37, dtype=torch.int32), torch.zeros(X, dtype=torch.uint8)
    csr = CompactCounts(
        torch.zeros(B + 1, dtype=torch.int32), torch.zeros(X, dtype=torch.int16), counts, where, where, G + 1
    )
    given, asked = (torch.ones((B, n) if own else (n,), dtype=torch.int16) for n in (n_given, n_asked))
    return CompactCellBatch(csr=csr, given_ids=given, asked_ids=given if n_given == n_asked else asked, **rest(B))


def train(name: str, stage: Any, batch: Any, precision: str) -> None:
    """A step as the loop makes it: the cells to the GPU, loss, backward, step, EMA, metrics; and validation."""
    hardware = HardwareConfig(engine="plain", precision=precision)
    engine = PlainEngine(stage.module, lambda model: make_optimizer(OptimConfig(), model), hardware, 10.0, GPU)
    ema, meter = EMA(engine, 0.999), Meter(GPU)
    with watched() as counts:
        here = batch.to(GPU.device)
        loss, parts = stage.loss(engine.model, here, Draws(0, 7, here.positions_B))
        engine.backward(loss / here.n_cells)
        engine.step(1e-3)
        ema.update()
        meter.add([{"loss": loss.detach(), **parts, "cells": here.weight_B.sum()}])
    note(f"{name}: step", counts)
    with watched() as counts, torch.no_grad():
        here = batch.to(GPU.device)
        stage.validation(engine.model, here, Draws(1, 0, here.positions_B))
    note(f"{name}: validation", counts)


def vae_of(preset: str, attention: str = "auto", **more: int) -> VAE:
    with torch.device(GPU.device):
        return VAE(dataclasses.replace(of_preset(preset, None), attention=attention, **more), G)


def dit_of(n_latents: int) -> DiT:
    with torch.device(GPU.device):
        return DiT(DiTConfig(library_size=True), n_latents, 16, {"type": 3, "donor": 2})


def vae_steps(B: int, own: bool, precision: str, ways: tuple[str, ...]) -> None:
    for way in ways:
        sets = "own sets" if own else "shared set"
        train(f"vae/20m {precision} {sets}, {way}", VAEStage(vae_of("20m", way)), cells(B, own), precision)


def few_cells(ways: tuple[str, ...]) -> None:
    """Four cells that are asked for every gene, and two layers each way."""
    for way in ways:
        stage = VAEStage(vae_of("20m", way, n_layers=2))
        train(f"vae/20m bf16 every gene asked, {way}", stage, cells(4, False, 8_000, G), "bf16")


def ldm_steps() -> None:
    batch = LatentBatch(latent_BLZ=torch.zeros(128, 64, 16), **rest(128))
    train("ldm/base bf16", LDMStage(dit_of(64), GuidanceConfig()), batch, "bf16")


def verbs(n: int = 70, n_genes: int = 3_699) -> None:
    """embed, reconstruct, generate, transform: two batches each, one step of the solver.

    Guidance is `joint`: what `shift` asks the network for instead depends on labels, which a trace lacks. It
    is found once a call, before the first batch.
    """
    genes = GeneVocab(tuple(f"ENSG{k:011d}" for k in range(n_genes)), "ensembl")
    labels = ConditionVocab({"type": ("T cell", "B cell", "NK"), "donor": ("d1", "d2")})
    sizes = LibrarySizeModel(("type", "donor"), {(): {(): LogNormal(9, 5.0, 0.1)}, ("type",): {}})
    with torch.device(GPU.device):
        vae = VAE(of_preset("20m", None), n_genes)
    networks = (net.eval().requires_grad_(False) for net in (vae, dit_of(64)))
    model = Pretrained(*networks, genes, labels, sizes, {}, "none", precision="bfloat16")
    counts = np.random.default_rng(0).poisson(0.2, (n, n_genes)).astype(np.int32)
    counts[:, 0] = 1
    obs = pd.DataFrame({"type": ["T cell"] * n, "donor": ["d1"] * n}, index=[f"c{k}" for k in range(n)])
    adata = ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(genes.ids)))
    wanted, few = obs.assign(library_size=1_000.0), SamplerConfig("heun", 1, guidance="joint", guidance_scale=1.5)
    runs = {
        "embed": lambda: model.embed(adata),
        "reconstruct": lambda: model.reconstruct(adata),
        "generate": lambda: model.generate(wanted, seed=0, sampler=few),
        "transform": lambda: model.transform(adata, {"type": "NK"}, sampler=few),
    }
    for name, run in runs.items():
        with watched() as counts:
            run()
        note(name, counts)


def encode() -> None:
    """`scldm encode`: two batches of its 64 cells, all genes, in bfloat16."""
    with torch.device(GPU.device):
        vae = VAE(of_preset("20m", None), G).eval().requires_grad_(False)
    config = encode_verb.EncodeConfig(vae="run", shards="shards", out="latents", precision="bfloat16")
    every = torch.ones(G, dtype=torch.int16)
    batch = dataclasses.replace(cells(config.batch, False), given_ids=every, asked_ids=every)
    shard_set: Any = SimpleNamespace(
        manifest=SimpleNamespace(genes=SimpleNamespace(n_genes=G)), gene_column=lambda _: np.zeros(G)
    )
    encode_verb.shard_batches = lambda *_, **__: [batch, batch]
    bar: Any = SimpleNamespace(advance=lambda _: None)
    with watched() as counts:
        made = list(
            encode_verb.latents(encode_verb.encoder(vae, shard_set, config, GPU), shard_set, 0, config, GPU, bar)
        )
    assert [x.shape for x in made] == 2 * [(config.batch, 64, 16)]
    note("encode", counts)


def every_step() -> dict[str, Any]:
    """name -> kernels, waits, sdpa."""
    with without_storage():
        vae_steps(32, False, "bf16", ("auto", "plain", "sdpa"))
        for precision, own in (("fp32", False), ("bf16", True)):
            vae_steps(32, own, precision, ("auto", "sdpa"))
        few_cells(("auto", "plain", "sdpa"))
        ldm_steps()
        verbs()
        encode()
    return FOUND
