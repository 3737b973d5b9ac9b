"""The kernels against their specification, one by one: forward and gradients, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from scldm.count_basis import N_BINS, TokenKind
from tests.scldm.kernels import plain

pytestmark = pytest.mark.heavy

pytest.importorskip("triton", reason="needs the package triton, which the extra `test` brings on Linux")

B, S, T, N, D = 3, 70, 80, 2, 16  # more genes than a block of a kernel has, and no multiple of it
ON_GPU = torch.cuda.is_available()  # whose matrix units take no float64
DEVICE, DTYPE, WITHIN = ("cuda", torch.float32, 1e-4) if ON_GPU else ("cpu", torch.float64, 1e-9)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE).to(DEVICE)


def rows(per_cell: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    row = torch.stack([torch.randperm(T, generator=generator)[:S] for _ in range(B)])
    return (row if per_cell else row[0]).to(DEVICE)


def check(kernel: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor], *rest) -> None:
    """The same numbers, and the same gradients of all inputs but integers."""
    found, true = [], []
    for of, out in ((kernel, found), (formula, true)):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        result = of(*leaves, *rest)
        weight = torch.linspace(-1, 1, result.numel(), dtype=DTYPE, device=DEVICE).view_as(result)
        (result * weight).sum().backward()
        out += [result.detach(), *(leaf.grad for leaf in leaves)]
    for k, (mine, theirs) in enumerate(zip(found, true, strict=True)):
        if mine is not None:  # of what the kernel gives a gradient
            assert (mine - theirs).norm() <= WITHIN * theirs.norm(), f"{k} of {len(found)}"
            assert theirs.norm() > 0


@pytest.mark.parametrize("per_cell", [False, True])
@pytest.mark.parametrize("kind", get_args(TokenKind))
def test_deviations_are_what_the_specification_says(kind: TokenKind, per_cell: bool) -> None:
    """Rows that several cells have, no genes, and variances below 0, which have no gradient."""
    from scldm.kernels.deviation import one_over_deviation

    row = rows(per_cell)
    row[..., -5:] = -1
    x_BS, K = 3 * drawn(B, S).abs(), N_BINS if kind == "bins" else 1
    u_KD, e_TD = drawn(K, D), drawn(T, D)
    ee_T = e_TD.square().mean(1)
    ee_T[::3] = -50
    inputs = [x_BS, row, u_KD @ u_KD.T / D, e_TD @ u_KD.T / D, ee_T]
    check(one_over_deviation, plain.one_over_deviation, inputs, 1e-5, kind)


@pytest.mark.parametrize("per_cell", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", get_args(TokenKind))
def test_pooling_is_what_the_specification_says(kind: TokenKind, per_cell: bool) -> None:
    from scldm.kernels.pool import pool

    M, H = 6, 8
    row = rows(per_cell)
    row[..., -5:] = -1  # no genes
    if per_cell:
        row[1] = -1  # and a cell without any
    x_BS, r_BS = 2 * drawn(B, S).abs(), drawn(B, S).abs() + 0.5
    x_BS[:, ::4] = 0  # counts of 0
    K = N_BINS if kind == "bins" else 1
    inputs = [x_BS, r_BS, row, drawn(N, M, K), drawn(T, N, M), drawn(T, N, H), drawn(K, N, H)]
    check(pool, plain.pool, inputs, kind)


@pytest.mark.parametrize("n_cells, n_genes, latents", [(1, 2, 6), (1, 70, 20), (5, 33, 3)])
def test_pooling_of_shapes_that_fill_no_tile(n_cells: int, n_genes: int, latents: int) -> None:
    from scldm.kernels.pool import pool

    x_BS, r_BS = 2 * drawn(n_cells, n_genes).abs(), drawn(n_cells, n_genes).abs() + 0.5
    inputs = [x_BS, r_BS, rows(False)[:n_genes], drawn(3, latents, N_BINS), drawn(T, 3, latents), drawn(T, 3, 5)]
    check(pool, plain.pool, [*inputs, drawn(N_BINS, 3, 5)], "bins")


@pytest.mark.parametrize("per_cell", [False, True])
def test_split_over_programs_pooling_is_the_same(per_cell: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients; with a part of the genes in which none is there, and a cell without any."""
    from scldm.kernels import pool

    row = rows(per_cell)
    row[..., 16:48] = -1
    if per_cell:
        row[1] = -1
    inputs = [drawn(B, S).abs(), drawn(B, S).abs(), row, drawn(N, 6, N_BINS), drawn(T, N, 6), 5 * drawn(T, N, 8)]
    inputs.append(drawn(N_BINS, N, 8))
    seen: list[int] = []
    combined = pool.combined
    monkeypatch.setattr(pool, "combined", lambda *x: seen.append(len(x[0])) or combined(*x))
    monkeypatch.setattr(pool, "LEAST_BLOCKS", 1)
    check(pool.pool, plain.pool, inputs, "bins")
    assert seen == [5], "70 genes are 5 blocks of 16"
    monkeypatch.setattr(pool, "PROGRAMS", 1)
    check(pool.pool, plain.pool, inputs, "bins")
    assert len(seen) == 1, "with programs enough, one takes all genes"


@pytest.mark.parametrize("programs, n_genes, genes", [(8, 8_192, 32), (64, 8_192, 32), (1, 1, 16), (9_999, 50, 32)])
def test_the_parts_hold_all_genes_once_and_fill_a_gpu(programs: int, n_genes: int, genes: int) -> None:
    from scldm.kernels.pool import LEAST_BLOCKS, PROGRAMS, parts

    n_parts, span = parts(programs, n_genes, genes)
    assert span % genes == 0, "a part begins where a block does"
    assert (n_parts - 1) * span < n_genes <= n_parts * span
    assert n_parts == 1 or (programs * n_parts <= PROGRAMS and span >= LEAST_BLOCKS * genes)
    if n_genes >= 8_192:
        assert programs * n_parts >= PROGRAMS / 2


@pytest.mark.parametrize("per_cell", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_reading_out_is_what_the_specification_says(per_cell: bool) -> None:
    from scldm.kernels.unpool import unpool

    R, F = N * 5, 24
    of_weights = [drawn(T, D) / 4, drawn(B, R, D), drawn(T, D), drawn(B, R, D), drawn(T), drawn(B, R)]
    of_hidden = [drawn(T, 2 * F), drawn(B, R, 2 * F), drawn(2 * F)]
    check(unpool, plain.unpool, [*of_weights, *of_hidden, rows(per_cell)], N, 1e-5)
