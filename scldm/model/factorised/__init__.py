"""Cross-attention between genes and latent tokens without a matrix product per gene and cell: the same function as
`MCAB`, the same parameters, in less time and memory.

A gene's token is `e_g + sum_k phi_k u_k`: a vector per gene, and a few numbers of its count times as many vectors that
all genes share. So keys, values and scores are sums of two table entries, one by gene and one by count, scaled by one
over the token's standard deviation (`pool`). Of an asked gene only a few numbers leave the decoder (`unpool`). So the
SwiGLU's last product and the head fold into one. Where the latent tokens are few beside the width, its first product is
taken per latent token instead of per gene. So it can be where cells have own sets in which a gene stands several times.

What is large, scores and hidden layers, is made tile by tile and made again in backward: within a processor's cache, or
within a share of a GPU's memory.

Reading order: pooling, unpooling, by_table, gated, tiles.
"""

from __future__ import annotations

from scldm.model.factorised.functions import compute_dtype
from scldm.model.factorised.pooling import pool, read_genes, tables
from scldm.model.factorised.unpooling import unpool

__all__ = ["compute_dtype", "pool", "read_genes", "tables", "unpool"]
