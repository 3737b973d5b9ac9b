"""Cross-attention between genes and latent tokens as fused kernels. tests/scldm/kernels/plain.py has the formulas that
they must equal, in a few lines of torch.

    deviation.py one over the standard deviation of a gene's token, by which its score and its value are scaled
    pool.py      genes -> latent tokens. It writes what the queries read, and no key, value or score
    unpool.py    latent tokens -> genes. It writes one number per gene
    tile.py      what the kernels are written with

The kernels need Triton, which torch brings for NVIDIA GPUs. Importing this room does not import it.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from scldm.errors import InputError

WIDEST_HEAD, MOST_READ = 256, 128 * 128  # of the encoder: what a head's latent tokens read lies in registers
MOST_PAIRS = 128  # of a decoder head and a latent token: their weights for a block of genes lie in registers


def check_shape(heads: int, latents: int) -> None:
    """Raises: InputError for a decoder whose pairs of a cross head and a latent token fill no tile, or too large a one.
    A tile's sides are powers of two. Latent tokens are filled up to one, of at least 16."""
    pairs = heads * max(16, 1 << (latents - 1).bit_length())
    if heads & (heads - 1) or pairs > MOST_PAIRS:
        raise InputError(
            f"model.attention=fused takes model.decoder_cross_heads={heads} only if it is a power of two and, times "
            f"model.n_latents={latents} filled up to a power of two, at most {MOST_PAIRS}, not {pairs}. "
            "model.attention=factorised takes any"
        )


def check_head(width: int, latents: int) -> None:
    """Raises: InputError for an encoder whose latent tokens read more with a head of this width than a tile holds.
    A tile's sides are powers of two, of at least 16."""
    head, tokens = (max(16, 1 << (n - 1).bit_length()) for n in (width, latents))
    most = min(WIDEST_HEAD, MOST_READ // tokens)
    if head > most:
        raise InputError(
            f"model.attention=fused takes heads (model.width over model.n_heads) of a width of at most {most} with "
            f"model.n_latents={latents}, not {width}. "
            "model.attention=factorised takes any"
        )


def check_available(device: torch.device) -> None:
    """Raises: InputError where fused kernels can't run on this device, before anything is computed."""
    other = "model.attention=factorised computes the same in torch"
    if importlib.util.find_spec("triton") is None:
        raise InputError(f"model.attention=fused needs the package triton, which is not installed. {other}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return  # Triton's interpreter, for tests: any device, and very slow
    if device.type != "cuda":
        raise InputError(f"model.attention=fused needs an NVIDIA GPU and this is {device}. {other}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(
            f"model.attention=fused needs compute capability 8.0 or more (A100, H100), "
            f"and {torch.cuda.get_device_name(device)} has less. {other}"
        )
