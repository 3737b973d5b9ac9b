"""What a forward pass of the autoencoder takes: floating-point operations of its matrix products, by the formula.

Twice the multiply-accumulates. A training step is three forward passes. Whatever path computes it, this is the work
that it is credited with.
"""

from __future__ import annotations

from scldm.count_basis import N_BINS
from scldm.model.blocks import hidden_width
from scldm.model.vae import VAEConfig


def vae_flops(config: VAEConfig, n_cells: int, n_given: int, n_asked: int) -> dict[str, int]:
    """FLOPs of a forward pass over cells with that many genes given and asked, which they share, by part."""
    D, L, Z, B = config.width, config.n_latents, config.latent_width, n_cells
    mlp = 3 * D * hidden_width(D)
    K = N_BINS if config.token == "bins" else 1
    tokens = D * D * n_given + B * n_given * K * D  # the embeddings' part is shared by the cells
    pool = L * D * D + B * (n_given * (2 * D * D + 2 * L * D) + L * (D * D + mlp))
    blocks = config.n_layers * B * L * (4 * D * D + 2 * L * D + mlp)
    latent = B * L * D * Z * (2 if config.kl_weight > 0 else 1)
    numbers = 2 if config.likelihood == "zinb" else 1
    unpool = n_asked * D * D + B * (2 * L * D * D + n_asked * (2 * L * D + D * D + mlp + numbers * D))
    direct_in, direct_out = B * D * (n_given + D), B * D * (n_asked + D)
    parts = {
        "tokens": tokens,
        "pool": pool,
        "encoder blocks": blocks,
        "latent": latent + B * L * D * Z,
        "decoder blocks": blocks,
        "unpool": unpool,
    }
    if config.direct:
        parts |= {"direct, in": direct_in, "direct, out": direct_out}
    return {name: 2 * macs for name, macs in parts.items()}


def expressed_flops(config: VAEConfig, n_genes: int, n_expressed: int) -> int:
    """FLOPs of encoding one cell from all genes by the expressed ones (all_genes.py), its tables not counted. A product
    in float64 counts twice, as it takes twice as long."""
    D, L, N, S, X = config.width, config.n_latents, config.n_heads, n_genes, n_expressed
    R, K = N * L, N_BINS if config.token == "bins" else 1
    read = X * (2 * K * R + K * K) + (X + K) * L * D  # scores, sums of phi, deviations, and values
    taken_away = 2 * X * L * D
    out = L * (D * D + 3 * D * hidden_width(D))
    direct = D * (S + D) if config.direct else 0
    rest = vae_flops(config, 1, 1, 1)
    latent = 2 * L * D * config.latent_width * (2 if config.kl_weight > 0 else 1)
    return 2 * (read + taken_away + out + direct) + rest["encoder blocks"] + latent
