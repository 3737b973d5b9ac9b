"""Weights: read from a file, put into a network that they fit, named by a hash.

Reading order: read_weights, network_of, weights_hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scldm.errors import InputError

Network = TypeVar("Network", bound=torch.nn.Module)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Raises: InputError for a file that is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); export the model again") from None


def network_of(make: Callable[[], Network], n_layers: int, tensors: Mapping[str, Tensor], where: str) -> Network:
    """What `make` makes, with these tensors in it. No memory is taken before it is known that they are its own.

    n_layers: of its config
    where: the file of the tensors
    Raises: InputError where they are another network's, or a number of them is not finite.
    """
    if n_layers > len(tensors):
        raise InputError(f"{where}: {len(tensors)} tensors are no network of n_layers={n_layers}")
    try:
        with torch.device("meta"):
            expected = make().state_dict()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (RuntimeError, OverflowError) as error:  # of sizes whose product is beyond 64 bits
        raise InputError(f"{where}: no network can be of this shape: {str(error).splitlines()[0]}") from None
    for name in sorted(expected.keys() | tensors.keys()):
        ours, theirs = (_kind(of.get(name)) for of in (expected, tensors))
        if ours != theirs:
            raise InputError(
                f"{where}: weights, config and vocabularies do not belong together: {name} is {theirs}, the network "
                f"has {ours}"
            )
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{where}: {name} has numbers that are not finite: the training failed, or it is damaged")
    network = make()
    network.load_state_dict(dict(tensors))
    return network


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values of all weights."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
