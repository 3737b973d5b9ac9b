"""Weights of a model folder: read, put into a network, named by a hash.

Reading order: read_weights, put_in, weights_hash.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scldm.errors import InputError


def read_weights(path: Path) -> dict[str, Tensor]:
    """Raises: InputError for a file that is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); export the model again") from None


def put_in(network: torch.nn.Module, tensors: dict[str, Tensor], net: str, folder: Path) -> None:
    """Those below NET/ into the network. Raises: InputError where they are another network's."""
    part = {key.removeprefix(f"{net}/"): value for key, value in tensors.items() if key.startswith(f"{net}/")}
    try:
        network.load_state_dict(part)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise InputError(f"{folder}: weights, config.json and vocabularies do not belong together: {first}") from None


def weights_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names and values of all weights."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
