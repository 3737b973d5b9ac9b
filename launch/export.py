"""`scldm export`: the EMA weights of trained runs, with all that they need, as one model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.registry import register
from launch.run_data import MISSING, check_encodes, kept_data
from launch.together import check_export
from launch.trained import Trained, dit_of, vae_of
from scldm.environment import describe
from scldm.library_size import LibrarySizeModel
from scldm.model_folder import check_replaceable, save_pretrained
from scldm.train.tracked import check_followed
from scldm.train.tracking import read_metrics
from scldm.vocab import ConditionVocab, GeneVocab

PURPOSE = "Write the EMA weights of trained runs as a model folder, which scldm.load reads without the training stack."
EXAMPLE = """
scldm export vae=runs/vae ldm=runs/ldm out=model
scldm export vae=runs/vae ldm=runs/ldm out=model register=pbmc alias=champion
"""


@dataclass(frozen=True)
class ExportConfig:
    """What to export.

    vae: run folder of the autoencoder
    ldm: run folder of the diffusion transformer. Empty exports an autoencoder, which embeds and does not generate
    out: model folder to write. An existing one is replaced
    which: checkpoint of both runs: best by the validation metric, or latest
    register: name in MLflow's model registry, where mlflow.pyfunc.load_model finds it; needs ldm, in whose MLflow run
        it is kept. Empty registers nothing
    alias: of the version that is registered, such as champion: models:/NAME@champion is then this one
    """

    vae: str
    out: str
    ldm: str = ""
    which: Literal["best", "latest"] = "best"
    register: str = ""
    alias: str = ""

    def __post_init__(self) -> None:
        check_export(self)


CONFIG = ExportConfig


def main(config: ExportConfig) -> Path:
    """Write the folder. Returns it. Raises: InputError where the two runs do not belong together."""
    out = Path(config.out)
    check_replaceable(out)
    if config.register:
        check_followed(Path(config.ldm))
    trained: dict[str, Trained[Any]] = {"vae": vae_of(Path(config.vae), config.which)}
    vae, dit, data = trained["vae"].shape(), None, trained["vae"].folder
    if config.ldm:
        of = vae.config.n_latents, vae.config.latent_width
        trained["ldm"] = dit_of(Path(config.ldm), trained["vae"], of, config.which)
        dit = trained["ldm"].shape()
        check_encodes(config.vae, data, kept_data(trained["ldm"].folder), f"ldm={config.ldm}", is_first=True)
        data = trained["ldm"].folder
    missing = kept_data(data).get(MISSING, {}).get("label", "")
    origin = {stage: trained[stage].origin if stage in trained else None for stage in ("vae", "ldm")}
    origin |= {"missing": missing, "exported": describe()}
    genes = GeneVocab.load(data / "genes.json")
    conditions = ConditionVocab.load(data / "conditions.json")
    runs = {"vae": config.vae, **({"ldm": config.ldm} if config.ldm else {})}
    history = {stage: read_metrics(run) for stage, run in runs.items()}
    sizes = LibrarySizeModel.load(data / "library_sizes.json")
    weights = {stage: of.weights for stage, of in trained.items()}
    save_pretrained(out, vae, dit, genes, conditions, sizes, origin, history, weights=weights)
    print(f"model: {out}")
    if config.register:
        print(f"registered: {register(out, Path(config.ldm), config.register, config.alias)}")
    return out
