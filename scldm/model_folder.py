"""A trained model on the disk, as `scldm export` writes it and `scldm.load` reads it.

model.safetensors   vae/NAME and ldm/NAME: EMA of the weights, and buffers
config.json         shapes of both networks, sampler, format version, where the weights come from
genes.json  conditions.json  library_sizes.json
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from scldm.files import made_aside, write_json
from scldm.library_size import LibrarySizeModel
from scldm.model.dit import DiT
from scldm.model.vae import VAE
from scldm.vocab import ConditionVocab, GeneVocab

FORMAT_VERSION = 4


def save_pretrained(
    folder: Path,
    vae: VAE,
    dit: DiT | None,
    genes: GeneVocab,
    conditions: ConditionVocab,
    library_sizes: LibrarySizeModel,
    origin: dict[str, Any],
) -> None:
    """Write a model folder, whole or not at all.

    dit: None for an autoencoder alone, which embeds but does not generate
    origin: JSON of where the weights come from
    """
    networks = {"vae": vae} if dit is None else {"vae": vae, "ldm": dit}
    tensors = {f"{net}/{k}": v.contiguous() for net, m in networks.items() for k, v in m.state_dict().items()}
    config = {
        "format_version": FORMAT_VERSION,
        "vae": asdict(vae.config),
        "ldm": None if dit is None else asdict(dit.config),
        "conditions": list(conditions.names) if dit is None else list(dit.n_labels),
        "origin": origin,
    }
    with made_aside(folder.resolve()) as part:
        part.mkdir()
        save_file(tensors, part / "model.safetensors")
        write_json(part / "config.json", config)
        genes.save(part / "genes.json")
        conditions.save(part / "conditions.json")
        library_sizes.save(part / "library_sizes.json")
