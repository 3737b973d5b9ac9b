"""`scldm export`: the averaged weights of trained runs, with all that they need, as one model folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.cli import run_verb
from scldm.environment import describe
from scldm.errors import InputError, read_json
from scldm.library_size import LibrarySizeModel
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, VAEConfig
from scldm.model_folder import save_pretrained
from scldm.train.checkpoint import averaged, load_averaged
from scldm.train.run_folder import read_config
from scldm.vocab import ConditionVocab, GeneVocab
from scldm.weights import weights_hash

PURPOSE = (
    "Write the averaged weights of trained runs as a model folder, which scldm.load reads without the training stack."
)
EXAMPLE = """
scldm export vae=runs/vae ldm=runs/ldm out=model
"""


@dataclass(frozen=True)
class ExportConfig:
    """What to export.

    vae: run folder of the autoencoder
    ldm: run folder of the diffusion transformer; empty exports an autoencoder that embeds and does not generate
    out: model folder to write; an existing one is replaced
    which: checkpoint of both runs: best by the validation metric, or latest
    """

    vae: str
    out: str
    ldm: str = ""
    which: Literal["best", "latest"] = "best"


CONFIG = ExportConfig


def main(config: ExportConfig) -> Path:
    """Write the folder; returns it. Raises: InputError where the two runs do not belong together."""
    out = Path(config.out)
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and not a model folder; choose another out")
    vae, vae_origin = trained_vae(Path(config.vae), config.which)
    dit, ldm_origin, data = None, None, Path(config.vae)
    if config.ldm:
        data = Path(config.ldm)
        dit, ldm_origin = trained_dit(data, vae, config.which)
    origin = {"vae": vae_origin, "ldm": ldm_origin, "exported": describe()}
    genes = GeneVocab.load(data / "genes.json")
    conditions = ConditionVocab.load(data / "conditions.json")
    save_pretrained(out, vae, dit, genes, conditions, LibrarySizeModel.load(data / "library_sizes.json"), origin)
    print(f"model: {out}")
    return out


def trained_vae(run_dir: Path, which: Literal["best", "latest"]) -> tuple[VAE, dict[str, Any]]:
    """The autoencoder of a run, and where it comes from; `hash` is that of its weights."""
    run = read_config(run_dir)
    if (run_dir / "latents.json").is_file():
        raise InputError(f"vae={run_dir} is a run of `scldm train ldm`, not of `scldm train vae`")
    vae = VAE(VAEConfig(**run["model"]).portable, GeneVocab.load(run_dir / "genes.json").n_genes)
    step = load_averaged(vae, run_dir, which)
    origin = {"run": str(run_dir), "step": step, "hash": weights_hash(vae.state_dict()), "config": run}
    return vae.eval().requires_grad_(False), origin


def trained_dit(run_dir: Path, vae: VAE, which: Literal["best", "latest"]) -> tuple[DiT, dict[str, Any]]:
    """The diffusion transformer of a run on this autoencoder's latents.

    Raises: InputError where its latents are another autoencoder's.
    """
    run = read_config(run_dir)
    if not (run_dir / "latents.json").is_file():
        raise InputError(f"ldm={run_dir} is not a run of `scldm train ldm`")
    latents = read_json(run_dir / "latents.json")
    if latents["vae"] != weights_hash(vae.state_dict()):
        raise InputError(
            f"{run_dir} was trained on the latents of another autoencoder (weights {latents['vae'][:12]}, "
            f"this one {weights_hash(vae.state_dict())[:12]}); name the run and checkpoint that encoded them"
        )
    conditions = ConditionVocab.load(run_dir / "conditions.json")
    n_labels = {name: conditions.n_labels(name) for name in conditions.names}
    shape = (vae.config.n_latents, vae.config.latent_width)
    dit = DiT.of_tensors(DiTConfig(**run["model"]).portable, *shape, n_labels, averaged(run_dir, which)[0])
    step = load_averaged(dit, run_dir, which)
    return dit.eval(), {"run": str(run_dir), "step": step, "hash": weights_hash(dit.state_dict()), "config": run}


if __name__ == "__main__":
    sys.exit(run_verb("export", sys.argv[1:]))
