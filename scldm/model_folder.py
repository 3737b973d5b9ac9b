"""A trained model on the disk, as `scldm export` writes it and `scldm.load` reads it.

model.safetensors   vae/NAME and ldm/NAME: EMA of the weights, and buffers
config.json         shapes of both networks, format version, where the weights come from, hashes of all that is here
genes.json  conditions.json  library_sizes.json
history.json        stage -> rows of its metrics, where they are known
gene_columns.json   name -> a text for each gene, such as symbols, where there are any
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from scldm.errors import InputError, read_json
from scldm.files import made_aside, sha256_of, write_json
from scldm.given_json import sealed, typed, unsealed
from scldm.library_size import LibrarySizeModel
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, VAEConfig
from scldm.model_files import CONFIG, GENE_COLUMNS, HISTORY, TABLES, check_names
from scldm.vocab import ConditionVocab, GeneVocab
from scldm.weights import hash_of_file, write_weights

FORMAT_VERSION = 4


@dataclass(frozen=True)
class Stored:
    """What config.json holds, with a SHA-256 of it.

    ldm: none for an autoencoder alone
    conditions: of the diffusion transformer, in its order
    origin: where the weights come from
    weights: hash of all weights
    files: SHA-256 of the other files but the weights
    """

    format_version: int
    vae: VAEConfig
    ldm: DiTConfig | None
    conditions: tuple[str, ...]
    origin: dict[str, Any]
    weights: str
    files: dict[str, str]


def read_config(folder: Path) -> Stored:
    """Raises: InputError for a folder that is no model's, of another version, or whose config was changed."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json. `scldm export` writes one")
    document = read_json(path)
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{folder}: format version {version!r}. This scldm reads {FORMAT_VERSION}")
    return typed(Stored, unsealed(document, str(path)), str(path))


def check_files(folder: Path, stored: Stored, weights: str) -> None:
    """Raises: InputError where weights, by their hash, or vocabularies are not those that were exported."""
    for name, sha256 in stored.files.items():
        if name not in TABLES or sha256_of(folder / name)[1] != sha256:
            raise InputError(f"{folder / name}: its SHA-256 is not that of config.json: damaged or changed")
    if stored.weights != weights:
        path = folder / "model.safetensors"
        raise InputError(f"{path}: its weights are not those that were exported: damaged or changed")


def check_replaceable(folder: Path) -> None:
    """Raises: InputError for a folder that holds anything but a model folder's files."""
    if check_names(folder):
        read_config(folder)  # ours, and not another program's config.json


def save_pretrained(
    folder: Path,
    vae: VAE,
    dit: DiT | None,
    genes: GeneVocab,
    conditions: ConditionVocab,
    library_sizes: LibrarySizeModel,
    origin: dict[str, Any],
    history: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    gene_columns: Mapping[str, Sequence[str]] | None = None,
    weights: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a model folder, whole or not at all. One that is there is replaced.

    dit: None for an autoencoder alone, which embeds but does not generate
    origin: JSON of where the weights come from
    weights: of networks on the meta device, by `vae` and `ldm`. One tensor at a time is asked for
    Raises: InputError where the folder holds other files.
    """
    folder = folder.resolve()
    check_replaceable(folder)
    networks = {"vae": vae} if dit is None else {"vae": vae, "ldm": dit}
    empty = {net: network.state_dict() for net, network in networks.items()}
    tensors = _Prefixed(weights or empty)
    with made_aside(folder) as part:
        part.mkdir()
        write_weights(part / "model.safetensors", tensors, _Prefixed(empty), {"format": "pt"})
        genes.save(part / "genes.json")
        conditions.save(part / "conditions.json")
        library_sizes.save(part / "library_sizes.json")
        for name, table in ((HISTORY, history), (GENE_COLUMNS, gene_columns)):
            if table:
                write_json(part / name, table)
        config = {
            "format_version": FORMAT_VERSION,
            "vae": asdict(vae.config),
            "ldm": None if dit is None else asdict(dit.config),
            "conditions": list(conditions.names) if dit is None else list(dit.n_labels),
            "origin": json.loads(json.dumps(origin)),
            "weights": hash_of_file(part / "model.safetensors"),
            "files": {name: sha256_of(part / name)[1] for name in TABLES if (part / name).is_file()},
        }
        write_json(part / CONFIG, sealed(config))


class _Prefixed(Mapping[str, Tensor]):
    """NETWORK/NAME -> the tensor NAME of the network."""

    def __init__(self, of: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.of = of

    def __getitem__(self, key: str) -> Tensor:
        network, _, name = key.partition("/")
        return self.of[network][name]

    def __iter__(self) -> Iterator[str]:
        return (f"{network}/{name}" for network, tensors in self.of.items() for name in tensors)

    def __len__(self) -> int:
        return sum(map(len, self.of.values()))


def read_gene_columns(folder: Path, genes: GeneVocab) -> pd.DataFrame:
    """Raises: InputError where the file is not one text a gene in each column."""
    path = folder / GENE_COLUMNS
    columns = typed(dict[str, list[str]], read_json(path), str(path)) if path.is_file() else {}
    if wrong := [name for name, texts in columns.items() if len(texts) != genes.n_genes]:
        raise InputError(f"{path} is damaged: {wrong[0]} must hold a text for each of {genes.n_genes} genes")
    return pd.DataFrame(columns, index=pd.Index(genes.ids)) if columns else pd.DataFrame()


def read_history(folder: Path) -> dict[str, pd.DataFrame]:
    """Raises: InputError where the file holds no rows by stage."""
    path = folder / HISTORY
    rows = typed(dict[str, list[dict[str, Any]]], read_json(path), str(path)) if path.is_file() else {}
    return {stage: pd.DataFrame(of) for stage, of in rows.items()}
