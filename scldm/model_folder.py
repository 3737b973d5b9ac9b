"""A trained model on the disk, as `scldm export` writes it and `scldm.load` reads it.

model.safetensors   vae/NAME and ldm/NAME: EMA of the weights, and buffers
config.json         shapes of both networks, sampler, format version, where the weights come from
genes.json  conditions.json  library_sizes.json
history.json        stage -> rows of its metrics; where they are known
gene_columns.json   name -> a text for each gene, such as symbols; where there are any
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from scldm.library_size import LibrarySizeModel
from scldm.model.dit import DiT
from scldm.model.vae import VAE
from scldm.vocab import ConditionVocab, GeneVocab

FORMAT_VERSION = 4
HISTORY, GENE_COLUMNS = "history.json", "gene_columns.json"


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
) -> None:
    """Write a model folder, whole or not at all.

    dit: None for an autoencoder alone, which embeds but does not generate
    origin: JSON of where the weights come from
    """
    folder = folder.resolve()
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    networks = {"vae": vae} if dit is None else {"vae": vae, "ldm": dit}
    tensors = {f"{net}/{k}": v.contiguous() for net, m in networks.items() for k, v in m.state_dict().items()}
    save_file(tensors, aside / "model.safetensors")
    config = {
        "format_version": FORMAT_VERSION,
        "vae": asdict(vae.config),
        "ldm": None if dit is None else asdict(dit.config),
        "conditions": list(conditions.names) if dit is None else list(dit.n_labels),
        "origin": origin,
    }
    (aside / "config.json").write_text(json.dumps(config, indent=1))
    genes.save(aside / "genes.json")
    conditions.save(aside / "conditions.json")
    library_sizes.save(aside / "library_sizes.json")
    for name, table in ((HISTORY, history), (GENE_COLUMNS, gene_columns)):
        if table:
            (aside / name).write_text(json.dumps(table))
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
