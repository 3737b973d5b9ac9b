"""Latent tokens -> genes: attention, LayerNorm, SwiGLU and head of the decoder, one number per gene and cell.

Forward: a program takes a block of genes of one cell. It makes their weights over the latent tokens. Then it makes
what they read, for its variance. Both have D in pieces. Then it goes over the hidden layer in pieces, and sums each as
soon as it is made.
Backward: a chunk of genes at a time, the weights are made again in torch (`weights`). The hidden layer is made again in
tiles. Three kernels sum it: over cells for the tables of genes, over genes for those of cells, and over itself for the
weights. So no two programs write to the same place. Where each cell has its own set, a row of the table has genes of
several cells, and its gradients meet in atomic additions, in no fixed order.

T rows of the tables, one for a gene. `row` says which of them a gene of the set is: (S,) where the cells share a set,
(B, S) where each has its own. R = N L pairs of a head and a latent token. F numbers of a hidden layer.
Reading order: unpool, _Unpool, weights, the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scldm.kernels.tile import LEAST, Tile, ceil_div, dot, dot_tf32, launch, power_of_two
from scldm.tf32 import tf32_products

CHUNK = 1 << 24  # weights that backward makes at once: 64 MB of float32, and a few times that while it does
OF_WEIGHTS = 6  # of the inputs of `unpool`, those that `weights` takes come first


def tile_of(pairs: int, bf16: bool) -> tuple[Tile, int]:
    """A program's tile, and the numbers of a piece of the hidden layer (its values, and as many gates) or of D."""
    warps = 4 if pairs <= 64 else 8
    if not bf16:  # products without matrix units, whose operands lie in registers
        return Tile(genes=16, warps=warps, stages=2), 16
    return Tile(genes=64, warps=warps, stages=2, registers=None if warps == 4 else 128), 32


def tables_tile(tile: Tile, pairs: int, bf16: bool, n_genes: int) -> Tile:
    """Of `_to_tables`. Where the genes are no multiple of 16, a cell's numbers are loaded one by one. In float32, with
    64 pairs, that leaves a thread of 4 warps too few registers, and spills 300 B of it. With 8 warps none."""
    return tile._replace(warps=8) if not bf16 and pairs == 64 and n_genes % LEAST else tile


def unpool(
    q_TD: Tensor,
    k_BRD: Tensor,
    t_TD: Tensor,
    U_BRD: Tensor,
    line_T: Tensor,
    line_BR: Tensor,
    T_TF: Tensor,
    B_BRF: Tensor,
    b_F: Tensor,
    row: Tensor,
    n_heads: int,
    eps: float,
) -> Tensor:
    """line + sum of value * silu(gate) with (value, gate) = r (T + p B) + b, (B, Q): `head(f + SwiGLU(LN(f)))`, in the
    precision of t. Products of q and k, and those of the hidden layer, are in theirs. `weights` has p, r and line."""
    inputs = (q_TD, k_BRD, t_TD, U_BRD, line_T, line_BR, T_TF, B_BRF, b_F, row.to(torch.int32))
    out = _Unpool.apply(*(x.contiguous() for x in inputs), n_heads, eps)
    assert isinstance(out, Tensor)
    return out


class _Unpool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, n_heads, eps = inputs
        q_TD, k_BRD, t_TD, U_BRD, line_T, line_BR, T_TF, B_BRF, b_F, row = tensors
        ctx.save_for_backward(*tensors)
        ctx.n_heads, ctx.eps = n_heads, eps
        (B, R, D), Q, F = k_BRD.shape, row.shape[-1], b_F.shape[0] // 2
        latents = R // n_heads
        # heads are apart by a power of two, as they are in a tile
        k_BRD, U_BRD, line_BR, B_BRF = (_apart(x, n_heads) for x in (k_BRD, U_BRD, line_BR, B_BRF))
        out, bf16 = t_TD.new_empty(B, Q), B_BRF.dtype == torch.bfloat16
        tile, piece = tile_of(k_BRD.shape[1], bf16)
        launch(
            _forward,
            (B, ceil_div(Q, tile.genes)),
            *(q_TD, k_BRD, t_TD, U_BRD, line_T, line_BR, T_TF, B_BRF, b_F, row, out),
            *(Q, D, F, latents, eps, 0 if row.ndim == 1 else Q),
            HEADS=n_heads,
            PAIRS=k_BRD.shape[1],
            HIDDEN=piece,
            CHANNELS=piece,
            BF16=bf16,
            tile=tile,
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, row = ctx.saved_tensors
        d_out = grad_outputs[0]
        assert row.shape[-1], "no genes are asked"
        d_of_weights: list[Tensor] = []  # those of the first genes as they come, then sums
        d_of_kernels = [torch.zeros_like(x, dtype=d_out.dtype) for x in tensors[OF_WEIGHTS:]]
        (B, R), dtype = tensors[1].shape[:2], tensors[7].dtype
        step = max(1, CHUNK // (B * R))
        for start in range(0, row.shape[-1], step):
            genes = slice(start, start + step)
            # beside bf16 the weights' products in TF32, as in forward: tests/scldm/kernels/test_tf32.py has the error
            with tf32_products(dtype == torch.bfloat16):
                found = _backward_of(
                    row[..., genes], d_out[:, genes].contiguous(), tensors, d_of_kernels, ctx.n_heads, ctx.eps
                )
            d_of_weights = [d.to(d_out.dtype) + more for d, more in zip(d_of_weights, found)] or list(found)
        d_inputs = (d.to(x.dtype) for d, x in zip([*d_of_weights, *d_of_kernels], tensors))
        return (*d_inputs, None, None, None)


def _backward_of(
    row: Tensor, d_out: Tensor, tensors: list[Tensor], d_of_kernels: list[Tensor], n_heads: int, eps: float
) -> tuple[Tensor, ...]:
    """Gradients from some genes: returns those of what `weights` takes, and adds the others."""
    of_weights, (T_TF, B_BRF, b_F) = tensors[:OF_WEIGHTS], tensors[OF_WEIGHTS:]
    d_T, d_B, d_b = d_of_kernels
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in of_weights]
        q, k, t, U, line_T, line_B = leaves
        p_BQR, r_BQ, line_BQ = weights(q, k, t, U, line_T, line_B, row.long(), n_heads, eps)
        scaled_BQR = (p_BQR * r_BQ[:, :, None]).to(B_BRF.dtype)
    (B, Q, R), F, shared = p_BQR.shape, b_F.shape[0] // 2, row.ndim == 1
    row, p, r = row.contiguous(), scaled_BQR.detach().contiguous(), r_BQ.detach().contiguous()
    d_p, d_r = torch.empty_like(p, dtype=d_out.dtype), torch.empty_like(r)
    d_b_B = d_b.new_empty(B, 2 * F)
    pairs, bf16 = power_of_two(R), B_BRF.dtype == torch.bfloat16
    tile, piece = tile_of(pairs, bf16)
    if R % LEAST:  # weights are loaded one by one: their addresses do not fit into 128 registers beside the rest
        tile = tile._replace(registers=None)
    pieces, blocks = ceil_div(F, piece), ceil_div(Q, tile.genes)
    inputs, sizes = (p, r, T_TF, B_BRF, b_F, d_out, row), (B, Q, R, F, 0 if shared else Q)
    tiles: dict[str, Any] = {"PAIRS": pairs, "HIDDEN": piece, "BF16": bf16, "tile": tile}
    of_tables = {**tiles, "SHARED": shared, "tile": tables_tile(tile, pairs, bf16, Q)}
    launch(_to_tables, (blocks, pieces, 1 if shared else B), *inputs, d_T, *sizes, **of_tables)
    launch(_to_latents, (B, pieces), *inputs, d_B, d_b_B, *sizes, **tiles)
    launch(_to_weights, (B, blocks), *inputs, d_p, d_r, *sizes, **tiles)
    d_b += d_b_B.sum(0)
    return torch.autograd.grad((scaled_BQR, r_BQ, line_BQ), leaves, (d_p.to(scaled_BQR.dtype), d_r, d_out))


def weights(
    q_TD: Tensor,
    k_BRD: Tensor,
    t_TD: Tensor,
    U_BRD: Tensor,
    line_T: Tensor,
    line_BR: Tensor,
    row: Tensor,
    n_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a gene reads of the latent tokens: f = t + p U, centred over D. Returns p (B, Q, R), one over f's standard
    deviation (B, Q), and line_T + p line_BR (B, Q), what the head makes of f where that is linear.
    """
    score_BQR = q_TD[row] @ k_BRD.transpose(1, 2)
    wide = score_BQR.to(t_TD.dtype)
    p_BQR = wide.unflatten(2, (n_heads, -1)).softmax(3).flatten(2)
    t = t_TD[row]
    cross_BQR = 2 * (t @ U_BRD.transpose(1, 2)) + p_BQR @ (U_BRD @ U_BRD.transpose(1, 2))
    square_BQ = t.square().sum(-1) + (p_BQR * cross_BQR).sum(2)
    r_BQ = (square_BQ.clamp_min(0) / t_TD.shape[1] + eps).rsqrt()
    return p_BQR, r_BQ, line_T[row] + (p_BQR @ line_BR[:, :, None])[:, :, 0]


def _apart(x_BRK: Tensor, n_heads: int) -> Tensor:
    """Zeros after each head's latent tokens, up to a power of two of them: (B, R', ...)."""
    x_BNLK = x_BRK.unflatten(1, (n_heads, -1))
    latents = x_BNLK.shape[2]
    each = power_of_two(latents)
    if each == latents:
        return x_BRK
    padded = x_BNLK.new_zeros(*x_BNLK.shape[:2], each, *x_BNLK.shape[3:])
    padded[:, :, :latents] = x_BNLK
    return padded.flatten(1, 2)


@triton.jit
def _forward(
    q_ptr, k_ptr, t_ptr, U_ptr, line_T_ptr, line_B_ptr, T_ptr, B_ptr, b_ptr, row_ptr, out_ptr,
    Q, D, F, latents, eps, row_stride,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, GENES: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
    BF16: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A block of genes of one cell. PAIRS: HEADS x a power of two of latent tokens, of which `latents` are there."""
    wide = t_ptr.dtype.element_ty
    cell = tl.program_id(0).to(tl.int64)
    gene = tl.program_id(1) * GENES + tl.arange(0, GENES)
    pair = tl.arange(0, PAIRS)
    in_Q = gene < Q
    k_ptr, U_ptr, B_ptr = k_ptr + cell * PAIRS * D, U_ptr + cell * PAIRS * D, B_ptr + cell * PAIRS * (2 * F)
    row = tl.load(row_ptr + cell * row_stride + gene, mask=in_Q, other=0)

    score = tl.zeros([GENES, PAIRS], wide)
    for start in range(0, D, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        in_D = channel < D
        q = tl.load(q_ptr + row[:, None] * D + channel[None, :], mask=in_Q[:, None] & in_D[None, :], other=0.0)
        k = tl.load(k_ptr + pair[None, :] * D + channel[:, None], mask=in_D[:, None], other=0.0)
        score = dot(q, k, score, BF16, INTERPRETED)

    EACH: tl.constexpr = PAIRS // HEADS
    by_head = tl.reshape(tl.where((pair % EACH < latents)[None, :], score, -1e30), [GENES, HEADS, EACH])
    e = tl.exp(by_head - tl.expand_dims(tl.max(by_head, 2), 2))
    p = tl.reshape(e / tl.expand_dims(tl.sum(e, 2), 2), [GENES, PAIRS])

    square = tl.zeros([GENES], wide)
    for start in range(0, D, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        in_D = channel < D
        t = tl.load(t_ptr + row[:, None] * D + channel[None, :], mask=in_Q[:, None] & in_D[None, :], other=0.0)
        U = tl.load(U_ptr + pair[:, None] * D + channel[None, :], mask=in_D[None, :], other=0.0)
        # a variance scales the gene's whole hidden layer: so even beside bf16 it is taken of TF32
        f = dot_tf32(p, U, t, BF16, INTERPRETED)
        square += tl.sum(f * f, 1)
    r = 1 / tl.sqrt(square / D + eps)
    scaled = (p * r[:, None]).to(B_ptr.dtype.element_ty)
    line_B = tl.load(line_B_ptr + cell * PAIRS + pair)
    out = tl.load(line_T_ptr + row, mask=in_Q, other=0.0) + tl.sum(p * line_B[None, :], 1)

    for start in range(0, F, HIDDEN):
        f = start + tl.arange(0, HIDDEN)
        in_F = f < F
        value, gate = hidden(
            scaled, r, row, pair, f, T_ptr, B_ptr, b_ptr, F,
            in_Q, pair < PAIRS, in_F, BF16, INTERPRETED,
        )  # fmt: skip
        out += tl.sum(value * gate / (1 + tl.exp(-gate)), 1)
    tl.store(out_ptr + cell * Q + gene, out, mask=in_Q)


@triton.jit
def hidden(
    scaled, r, row, pair, f, T_ptr, B_ptr, b_ptr, F, in_Q, in_R, in_F,
    BF16: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(value, gate) of a block of genes of a cell for a piece f of the hidden layer: r T + scaled B + b. B_ptr: where
    the cell's begins."""
    T_at = T_ptr + row[:, None] * (2 * F) + f[None, :]
    B_at = B_ptr + pair[:, None] * (2 * F) + f[None, :]
    of_T, of_B = in_Q[:, None] & in_F[None, :], in_R[:, None] & in_F[None, :]
    value = r[:, None] * tl.load(T_at, mask=of_T, other=0.0) + tl.load(b_ptr + f, mask=in_F, other=0.0)[None, :]
    gate = r[:, None] * tl.load(T_at + F, mask=of_T, other=0.0) + tl.load(b_ptr + F + f, mask=in_F, other=0.0)[None, :]
    value = dot(scaled, tl.load(B_at, mask=of_B, other=0.0), value, BF16, INTERPRETED)
    gate = dot(scaled, tl.load(B_at + F, mask=of_B, other=0.0), gate, BF16, INTERPRETED)
    return value, gate


@triton.jit
def d_hidden(value, gate, d_out):
    """Gradient to (value, gate) of value * silu(gate)."""
    sigmoid = 1 / (1 + tl.exp(-gate))
    return d_out[:, None] * gate * sigmoid, d_out[:, None] * value * sigmoid * (1 + gate * (1 - sigmoid))


@triton.jit
def _to_tables(
    p_ptr, r_ptr, T_ptr, B_ptr, b_ptr, d_out_ptr, row_ptr, d_T_ptr,
    B, Q, R, F, row_stride,
    SHARED: tl.constexpr, PAIRS: tl.constexpr, GENES: tl.constexpr, HIDDEN: tl.constexpr,
    BF16: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """d_T of a block of genes and a piece of the hidden layer, over all cells, or of one where each has its own set."""
    only = tl.program_id(2).to(tl.int64)
    gene = tl.program_id(0) * GENES + tl.arange(0, GENES)
    f, pair = tl.program_id(1) * HIDDEN + tl.arange(0, HIDDEN), tl.arange(0, PAIRS)
    in_Q, in_F, in_R = gene < Q, f < F, pair < R
    row = tl.load(row_ptr + only * row_stride + gene, mask=in_Q, other=0)
    d_T_value = tl.zeros([GENES, HIDDEN], r_ptr.dtype.element_ty)
    d_T_gate = tl.zeros([GENES, HIDDEN], r_ptr.dtype.element_ty)
    p_at = gene[:, None] * R + pair[None, :]
    for cell in range(only, B if SHARED else only + 1):
        first = cell * Q
        r = tl.load(r_ptr + first + gene, mask=in_Q, other=0.0)
        scaled = tl.load(p_ptr + first * R + p_at, mask=in_Q[:, None] & in_R[None, :], other=0.0)
        value, gate = hidden(
            scaled, r, row, pair, f, T_ptr, B_ptr + cell * R * (2 * F), b_ptr, F, in_Q, in_R, in_F, BF16, INTERPRETED
        )
        d_value, d_gate = d_hidden(value, gate, tl.load(d_out_ptr + first + gene, mask=in_Q, other=0.0))
        d_T_value += d_value * r[:, None]
        d_T_gate += d_gate * r[:, None]
    at = d_T_ptr + row[:, None] * (2 * F) + f[None, :]
    inside = in_Q[:, None] & in_F[None, :]
    if SHARED:
        tl.store(at, d_T_value, mask=inside)
        tl.store(at + F, d_T_gate, mask=inside)
    else:
        tl.atomic_add(at, d_T_value, mask=inside, sem="relaxed")
        tl.atomic_add(at + F, d_T_gate, mask=inside, sem="relaxed")


@triton.jit
def _to_latents(
    p_ptr, r_ptr, T_ptr, B_ptr, b_ptr, d_out_ptr, row_ptr, d_B_ptr, d_b_ptr,
    B, Q, R, F, row_stride,
    PAIRS: tl.constexpr, GENES: tl.constexpr, HIDDEN: tl.constexpr, BF16: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """d_B and d_b of a cell and a piece of the hidden layer, over all genes, added to what is there of d_B."""
    cell = tl.program_id(0).to(tl.int64)
    f, pair = tl.program_id(1) * HIDDEN + tl.arange(0, HIDDEN), tl.arange(0, PAIRS)
    in_F, in_R = f < F, pair < R
    B_ptr, B_at = B_ptr + cell * R * (2 * F), d_B_ptr + cell * R * (2 * F) + pair[:, None] * (2 * F) + f[None, :]
    of_B = in_R[:, None] & in_F[None, :]
    p_ptr, r_ptr, d_out_ptr = p_ptr + cell * Q * R, r_ptr + cell * Q, d_out_ptr + cell * Q
    d_B_value = tl.load(B_at, mask=of_B, other=0.0)
    d_B_gate = tl.load(B_at + F, mask=of_B, other=0.0)
    d_b_value = tl.zeros([HIDDEN], r_ptr.dtype.element_ty)
    d_b_gate = tl.zeros([HIDDEN], r_ptr.dtype.element_ty)
    for start in range(0, Q, GENES):
        gene = start + tl.arange(0, GENES)
        in_Q = gene < Q
        row = tl.load(row_ptr + cell * row_stride + gene, mask=in_Q, other=0)
        r = tl.load(r_ptr + gene, mask=in_Q, other=0.0)
        p_at = gene[:, None] * R + pair[None, :]
        scaled = tl.load(p_ptr + p_at, mask=in_Q[:, None] & in_R[None, :], other=0.0)
        value, gate = hidden(scaled, r, row, pair, f, T_ptr, B_ptr, b_ptr, F, in_Q, in_R, in_F, BF16, INTERPRETED)
        d_value, d_gate = d_hidden(value, gate, tl.load(d_out_ptr + gene, mask=in_Q, other=0.0))
        d_B_value = dot(tl.trans(scaled), d_value, d_B_value, BF16, INTERPRETED)
        d_B_gate = dot(tl.trans(scaled), d_gate, d_B_gate, BF16, INTERPRETED)
        d_b_value += tl.sum(d_value, 0)
        d_b_gate += tl.sum(d_gate, 0)
    tl.store(B_at, d_B_value, mask=of_B)
    tl.store(B_at + F, d_B_gate, mask=of_B)
    tl.store(d_b_ptr + cell * (2 * F) + f, d_b_value, mask=in_F)
    tl.store(d_b_ptr + cell * (2 * F) + F + f, d_b_gate, mask=in_F)


@triton.jit
def _to_weights(
    p_ptr, r_ptr, T_ptr, B_ptr, b_ptr, d_out_ptr, row_ptr, d_p_ptr, d_r_ptr,
    B, Q, R, F, row_stride,
    PAIRS: tl.constexpr, GENES: tl.constexpr, HIDDEN: tl.constexpr, BF16: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Gradients to p r, and to r where it scales T, of a block of genes of a cell, over the hidden layer."""
    wide = r_ptr.dtype.element_ty
    cell = tl.program_id(0).to(tl.int64)
    gene, pair = tl.program_id(1) * GENES + tl.arange(0, GENES), tl.arange(0, PAIRS)
    in_Q, in_R = gene < Q, pair < R
    first = cell * Q
    row = tl.load(row_ptr + cell * row_stride + gene, mask=in_Q, other=0)
    r = tl.load(r_ptr + first + gene, mask=in_Q, other=0.0)
    p_at = gene[:, None] * R + pair[None, :]
    B_ptr += cell * R * (2 * F)
    scaled = tl.load(p_ptr + first * R + p_at, mask=in_Q[:, None] & in_R[None, :], other=0.0)
    d_out = tl.load(d_out_ptr + first + gene, mask=in_Q, other=0.0)
    d_p = tl.zeros([GENES, PAIRS], wide)
    d_r = tl.zeros([GENES], wide)
    for start in range(0, F, HIDDEN):
        f = start + tl.arange(0, HIDDEN)
        in_F = f < F
        value, gate = hidden(scaled, r, row, pair, f, T_ptr, B_ptr, b_ptr, F, in_Q, in_R, in_F, BF16, INTERPRETED)
        d_value, d_gate = d_hidden(value, gate, d_out)
        T_at = T_ptr + row[:, None] * (2 * F) + f[None, :]
        B_at = B_ptr + pair[None, :] * (2 * F) + f[:, None]
        of_T, of_B = in_Q[:, None] & in_F[None, :], in_R[None, :] & in_F[:, None]
        d_r += tl.sum(d_value * tl.load(T_at, mask=of_T, other=0.0), 1)
        d_r += tl.sum(d_gate * tl.load(T_at + F, mask=of_T, other=0.0), 1)
        d_p = dot(d_value, tl.load(B_at, mask=of_B, other=0.0), d_p, BF16, INTERPRETED)
        d_p = dot(d_gate, tl.load(B_at + F, mask=of_B, other=0.0), d_p, BF16, INTERPRETED)
    tl.store(d_p_ptr + first * R + p_at, d_p, mask=in_Q[:, None] & in_R[None, :])
    tl.store(d_r_ptr + first + gene, d_r, mask=in_Q)
