"""Cross-attention between genes and latent tokens as fused kernels, and the plain formulas that they must equal.

    plain.py     what is computed, in a few lines of torch
    deviation.py one over the standard deviation of a gene's token, by which its score and its value are scaled
    pool.py      genes -> latent tokens; writes what the queries read, and no key, value or score
    unpool.py    latent tokens -> genes; writes one number per gene
    tile.py      what the kernels are written with

The kernels need Triton, which torch brings for NVIDIA GPUs; importing this room does not import it.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from scldm.errors import InputError

WIDEST_HEAD = 256  # of the encoder's cross-attention: what its latent tokens read lies in registers
MOST_PAIRS = 128  # of a decoder head and a latent token: their weights for a block of genes lie in registers


def check_shape(heads: int, latents: int) -> None:
    """Raises: InputError for a decoder whose pairs of a cross head and a latent token fill no tile, or too large a one.
    A tile's sides are powers of two; latent tokens are filled up to one, of at least 16."""
    pairs = heads * max(16, 1 << (latents - 1).bit_length())
    if heads & (heads - 1) or pairs > MOST_PAIRS:
        raise InputError(
            f"model.attention=fused takes model.decoder_cross_heads={heads} only if it is a power of two and, times "
            f"model.n_latents={latents} filled up to a power of two, at most {MOST_PAIRS}, not {pairs}; factorised "
            "takes any"
        )


def check_head_width(head_width: int) -> None:
    """Raises: InputError for an encoder whose cross-attention has wider heads than a tile holds."""
    if head_width > WIDEST_HEAD:
        raise InputError(
            f"model.attention=fused takes heads of a width (model.width over model.n_heads) of at most {WIDEST_HEAD}, "
            f"not {head_width}; factorised takes any"
        )


def check_available(device: torch.device) -> None:
    """Raises: InputError where fused kernels can't run on this device, before anything is computed."""
    other = "model.attention=factorised computes the same in torch"
    if importlib.util.find_spec("triton") is None:
        raise InputError(f"model.attention=fused needs the package triton, which is not installed; {other}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return  # Triton's interpreter, for tests: any device, and very slow
    if device.type != "cuda":
        raise InputError(f"model.attention=fused needs an NVIDIA GPU and this is {device}; {other}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(
            f"model.attention=fused needs compute capability 8.0 or more (A100, H100), "
            f"and {torch.cuda.get_device_name(device)} has less; {other}"
        )
