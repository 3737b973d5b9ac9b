"""Losses are sums over cells by weight: how cells are cut into micro-batches, and fill-up cells, change nothing."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from scldm.batch import GeneCounts
from scldm.model.vae import VAE
from scldm.train.losses import Draws, GuidanceConfig, LDMStage, VAEStage
from tests.scldm.train.small_runs import CellsLoader, LatentsLoader, make_cells, make_dit, make_vae


def stage_and_batch(kind: str) -> tuple[Any, Any]:
    """A stage with random weights and one micro-batch of 12 cells, the last two of them fill-up."""
    torch.manual_seed(0)
    module = make_vae(0.5) if kind == "vae" else make_dit()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    loader = (CellsLoader if kind == "vae" else LatentsLoader)(make_cells(10, 0), 12, 12)
    stage = VAEStage(module) if isinstance(module, VAE) else LDMStage(module, GuidanceConfig(0.3))
    return stage, next(loader)[0]


def part(batch: Any, rows: slice) -> Any:
    """Some cells of a micro-batch as one of their own."""

    def cut(name: str, value):
        if isinstance(value, GeneCounts):
            return GeneCounts(value.gene_ids, value.counts_BS[rows])
        if isinstance(value, dict):
            return {key: column[rows] for key, column in value.items()}
        return value if name == "n_cells" else value[rows]

    return replace(batch, **{f.name: cut(f.name, getattr(batch, f.name)) for f in fields(batch)})


def loss_and_gradient(stage, batches) -> tuple[dict[str, float], list[torch.Tensor]]:
    sums: dict[str, float] = {}
    stage.module.zero_grad()
    for batch in batches:
        loss, parts = stage.loss(stage.module, batch, Draws(0, 3, batch.positions_B))
        (loss / batch.n_cells).backward()
        for key, value in {
            "loss": loss,
            **parts,
            **stage.validation(stage.module, batch, Draws(0, 3, batch.positions_B)),
        }.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
    return sums, [p.grad.clone() for p in stage.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["vae", "ldm"])
def test_micro_batches_add_up_and_cells_without_weight_add_nothing(kind: str) -> None:
    stage, batch = stage_and_batch(kind)
    assert batch.n_cells == 10
    whole, gradient = loss_and_gradient(stage, [batch])
    for cuts in ([slice(0, 5), slice(5, 12)], [slice(0, 10)]):  # two micro-batches; without the fill-up
        sums, other = loss_and_gradient(stage, [part(batch, rows) for rows in cuts])
        # sums of up to n = 12 cells x 24 genes x 16 numbers: they err by n / 2^24 = 3e-4 of their size at worst and by
        # sqrt(n) / 2^24 = 4e-6 at random; a cell that is left out or counted twice shows as 1e-1
        assert sums == pytest.approx(whole, rel=1e-4)
        apart = torch.stack([(a - b).norm() for a, b in zip(gradient, other, strict=True)]).norm()
        assert apart < 1e-4 * torch.stack([a.norm() for a in gradient]).norm()


def test_the_vae_loss_is_nll_and_weighted_kl_per_cell() -> None:
    stage, batch = stage_and_batch("vae")
    loss, parts = stage.loss(stage.module, batch, Draws(0, 3, batch.positions_B))
    torch.testing.assert_close(loss, parts["nll"] + 0.5 * parts["kl"])
    assert parts["kl"] > 1
    other, _ = stage.loss(stage.module, batch, Draws(0, 4, batch.positions_B))
    assert (other - loss).abs() > 1e-3  # the posterior is sampled, by step
    one, two = (stage.validation(stage.module, batch, Draws(0, k, batch.positions_B)) for k in (3, 4))
    assert one == two  # and not in validation


@pytest.mark.parametrize("likelihood", ["nb", "gaussian"])
def test_a_gaussian_value_is_one_of_the_whole_cell(likelihood: str) -> None:
    """As in generation, however few genes are asked: a share is one of the asked genes' total."""
    stage, batch = stage_and_batch("vae")
    shape = replace(stage.module.config, likelihood=likelihood)
    stage = VAEStage(VAE(shape, stage.module.n_genes).eval())
    draw = Draws(0, 3, batch.positions_B)
    own = stage.validation(stage.module, batch, draw)["nll"]
    larger = replace(batch, library_size_all_B=2 * batch.library_size_all_B)
    assert (stage.validation(stage.module, larger, draw)["nll"] != own) == (likelihood == "gaussian")
    larger = replace(batch, library_size_B=2 * batch.library_size_B)
    assert (stage.loss(stage.module, larger, draw)[0] != stage.loss(stage.module, batch, draw)[0]) == (
        likelihood == "nb"
    )


def test_the_ldm_hides_conditions_in_training_and_shows_them_in_validation() -> None:
    stage, batch = stage_and_batch("ldm")
    shown: list[torch.Tensor] = []

    class Noting(torch.nn.Module):
        def forward(self, z, t, conditions):
            shown.append(conditions["type"])
            return stage.module(z, t, conditions)

    stage.loss(Noting(), batch, Draws(0, 3, batch.positions_B))
    stage.validation(Noting(), batch, Draws(0, 3, batch.positions_B))
    assert torch.equal(shown[1], batch.conditions["type"])
    assert ((shown[0] == 3) | (shown[0] == shown[1])).all()
    assert 0 < (shown[0] == 3).sum() < 12
