"""The kernels against their specification, one by one: forward and gradients, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from scldm.count_basis import N_BINS, TokenKind
from scldm.kernels import plain

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


@pytest.mark.parametrize("per_cell", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_reading_out_is_what_the_specification_says(per_cell: bool) -> None:
    from scldm.kernels.unpool import unpool

    R, F = N * 5, 24
    of_weights = [drawn(T, D) / 4, drawn(B, R, D), drawn(T, D), drawn(B, R, D), drawn(T), drawn(B, R)]
    of_hidden = [drawn(T, 2 * F), drawn(B, R, 2 * F), drawn(2 * F)]
    check(unpool, plain.unpool, [*of_weights, *of_hidden, rows(per_cell)], N, 1e-5)
