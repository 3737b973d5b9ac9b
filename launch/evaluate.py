"""`scldm evaluate`: how good generated cells, an autoencoder or an embedding are; a table, every number in a file.

Reading order: EvaluateVerbConfig, main, the keys that a mode takes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from launch.cli import run_verb
from scldm.errors import InputError
from scldm.evaluate.compare import EvaluateConfig
from scldm.pretrained import BATCH_CELLS, Precision
from scldm.train.tracking import TrackingConfig

PURPOSE = """
generated=FILE judges generated cells: distances to the test cells beside those of the training cells (the floor) and of
baselines drawn from them, pooled, per combination of conditions and per condition. Also memorisation, responses to a
treatment, marker genes, library sizes and a map. Writes report.html, evaluation.json and figures/*.png.
vae=RUN without generated judges the reconstruction of test cells, beside mean profiles.
embedding=FILE judges how well labels can be read from an embedding, beside principal components.
"""
EXAMPLE = """
scldm evaluate generated=generated.h5ad shards=shards model=model out=evaluation
scldm evaluate generated=generated.h5ad real=cells.h5ad split=split conditions=cell_type,treatment out=evaluation
scldm evaluate generated=generated.h5ad shards=shards protocol=cfgen control.treatment=vehicle out=evaluation
scldm evaluate vae=runs/vae shards=shards
scldm evaluate embedding=embedded.h5ad label=cell_type held_out_by=donor
"""


@dataclass(frozen=True)
class EvaluateVerbConfig:
    """What `scldm evaluate` takes.

    generated: the generated cells' counts, as `scldm generate` writes them: .h5ad, .zarr or .soma
    out: folder for report.html, evaluation.json and figures; needed with generated, else empty writes no file
    conditions: conditions whose combinations are told apart, as cell_type,treatment; empty: all that the model has.
        Without a model, those of the shard set that the generated cells say. With vae, all of the set. none: no
        condition, so that all cells are judged together (unless a condition is named so)
    protocol: how cells are compared: scldm, or cfgen (2,000 variable genes, 30 components of the judged cells)
    control: reference label of a condition, for responses, as control.treatment=vehicle. One label of a usual name
        (control, ctrl, DMSO, ...) is found
    shards: shard set with the real cells, their splits and conditions, a folder or fsspec URL
    cache_folder: where the index and blocks of a remote set are kept; that of a training serves
    cache_gb: limit of the blocks kept there, in 1e9 bytes
    real: h5ad file with the real cells, instead of shards. With embedding, the file with the same cells' counts
    split: obs column of `real` that says train, validation or test
    layer: where the counts of `real` are: X, raw or a layer's name; empty looks in X, layers/counts and raw. With
        embedding and without real, the counts are those of the embedding's file
    model: model folder that `scldm export` wrote: its parts are judged too (reconstructed cells, and others)
    vae: folder of the autoencoder's training run. With generated, for its loss curves; else it is judged itself
    ldm: folder of the diffusion model's training run, for its loss curves
    published: data whose published scores of reconstruction stand beside those of vae, such as dentate_gyrus
    embedding: h5ad file that `scldm embed` wrote
    key: obsm entry that holds the embedding
    label: obs column that is to be read from the embedding
    held_out_by: obs column, such as donor: its labels are tested on cells of others
    device: torch device; empty is a GPU where there is one
    batch: cells that go through the model at once
    precision: float32, or bfloat16: for GPUs

    A key that the judged thing does not use is refused, unless it has its default.
    """

    generated: str = ""
    out: str = ""
    conditions: tuple[str, ...] = ()
    protocol: Literal["scldm", "cfgen"] = "scldm"
    control: dict[str, str] = field(default_factory=dict)
    shards: str = ""
    cache_folder: str = ""
    cache_gb: float = 50.0
    real: str = ""
    split: str = "split"
    layer: str = ""
    model: str = ""
    vae: str = ""
    ldm: str = ""
    published: str = ""
    embedding: str = ""
    key: str = "X_scldm"
    label: str = ""
    held_out_by: str = ""
    device: str = ""
    batch: int = BATCH_CELLS
    precision: Precision = "float32"
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


CONFIG = EvaluateVerbConfig


def main(config: EvaluateVerbConfig) -> dict:
    """Returns the evaluation, as in evaluation.json."""
    what = [key for key in ("generated", "embedding") if getattr(config, key)]
    if len(what) > 1:
        raise InputError("generated and embedding are judged apart: give one of them")
    if what == ["generated"]:
        if not config.out:
            raise InputError("generated needs out=FOLDER for the report and its figures")
        refuse_unused(config, "generated")
        from launch.evaluate_generated import evaluate_generated

        return evaluate_generated(config)
    out, seed = Path(config.out) if config.out else None, config.evaluate.seed
    if what == ["embedding"]:
        if not config.label:
            raise InputError("embedding needs label=COLUMN: the obs column that is to be read from it")
        refuse_unused(config, "embedding")
        from launch.evaluate_embedding import evaluate_embedding

        words = (config.embedding, config.label, config.held_out_by, config.key)
        return evaluate_embedding(*words, out, seed, config.real, layer=config.layer)
    if config.vae or config.model:
        if not config.shards:
            raise InputError("an autoencoder is judged on the test cells of a shard set: give shards=FOLDER")
        if config.vae and config.model:
            raise InputError("vae and model are judged apart without generated: give one of them")
        refuse_unused(config, "vae")
        from launch.evaluate_vae import evaluate_vae

        return evaluate_vae(
            config.vae or config.model,
            config.shards,
            out,
            conditions=config.conditions or None,
            published=config.published,
            seed=seed,
            max_cells=config.evaluate.max_real_cells,
            batch=config.batch,
            device=config.device,
            precision=config.precision,
            cache_folder=config.cache_folder,
            cache_gb=config.cache_gb,
        )
    raise InputError(
        "give what is to be judged: generated=FILE with shards or real, vae=RUN with shards, or embedding=FILE with "
        "label"
    )


# --- the keys that a mode takes --------------------------------------------------------------------------------------

# what is judged -> the keys it takes; a key takes those below it too
TAKES: Mapping[str, tuple[str, ...]] = {
    "generated": (
        *("generated", "out", "conditions", "protocol", "control", "shards", "cache_folder", "cache_gb", "real"),
        *("split", "layer", "model", "vae", "ldm", "device", "batch", "precision", "evaluate", "tracking"),
    ),
    "vae": (
        *("vae", "model", "shards", "cache_folder", "cache_gb", "out", "conditions", "published", "device", "batch"),
        *("precision", "evaluate.seed", "evaluate.max_real_cells", "tracking.enabled"),
    ),
    "embedding": (
        *("embedding", "key", "label", "held_out_by", "real", "layer", "out", "evaluate.seed", "tracking.enabled"),
    ),
}
# with generated: key -> the key without which it has no meaning
NEEDS: Mapping[str, str] = {
    **dict.fromkeys(("split", "layer"), "real"),
    **dict.fromkeys(("cache_folder", "cache_gb"), "shards"),
    **dict.fromkeys(("device", "batch", "precision"), "model"),
}


def refuse_unused(config: EvaluateVerbConfig, mode: str) -> None:
    """Raises: InputError for a key that was changed from its default, and that this mode does not use."""
    given = mode if getattr(config, mode) else "model"
    for key, value in changed(config, EvaluateVerbConfig()):
        if not any(key == taken or key.startswith(f"{taken}.") for taken in TAKES[mode]):
            raise InputError(
                f"{key}={value} has no effect with {given}=: leave it out. It takes {', '.join(TAKES[mode])}"
            )
        if mode == "generated" and (needed := NEEDS.get(key)) and not getattr(config, needed):
            raise InputError(f"{key}={value} has no effect with generated= without {needed}=: leave it out")


def changed(config: Any, default: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys whose value is not that of `default`, with their values."""
    for key in (of.name for of in fields(config)):
        value, other = getattr(config, key), getattr(default, key)
        if is_dataclass(value):
            yield from changed(value, other, f"{above}{key}.")
        elif value != other:
            yield above + key, value


if __name__ == "__main__":
    sys.exit(run_verb("evaluate", sys.argv[1:]))
