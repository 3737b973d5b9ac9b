"""The keys of `scldm evaluate`. Which of them each kind of evaluation takes is in launch/judged.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scldm.checked import Checked, checked
from scldm.evaluate.config import EvaluateConfig
from scldm.networks import BATCH_CELLS, Precision
from scldm.train.tracking import TrackingConfig


@dataclass(frozen=True)
class EvaluateVerbConfig(Checked):
    """What `scldm evaluate` takes.

    generated: the generated cells' counts, as `scldm generate` writes them: .h5ad, .zarr or .soma
    out: folder for report.html, evaluation.json and figures. generated needs it. Else empty writes no file
    conditions: conditions whose combinations are told apart, as cell_type,treatment. Empty: all that the model has.
        Without a model, those of the shard set that the generated cells say. With vae, all of the set. none: no
        condition, so that all cells are judged together (unless a condition is named so)
    protocol: how cells are compared: scldm, or cfgen (2,000 variable genes, 30 components of the judged cells)
    control: reference label of a condition, for responses, as control.treatment=vehicle. One label of a usual name
        (control, ctrl, DMSO, ...) is found
    shards: shard set with the real cells, their splits and conditions, a folder or fsspec URL
    cache_folder: where the index and blocks of a remote set are kept. That of a training serves
    cache_gb: limit of the blocks kept there, in 1e9 bytes
    real: h5ad file with the real cells, instead of shards. With embedding, the file with the same cells' counts
    split: obs column of `real` that says train, validation or test
    layer: where the counts of `real` are: X, raw or a layer's name. Empty looks in X, layers/counts and raw. With
        embedding and without real, the counts are those of the embedding's file
    model: model folder that `scldm export` wrote: its parts are judged too (reconstructed cells, and others)
    vae: folder of the autoencoder's training run. With generated, for its loss curves. Else it is judged itself
    ldm: folder of the diffusion model's training run, for its loss curves
    published: data whose published scores of reconstruction stand beside those of vae, such as dentate_gyrus
    embedding: h5ad file that `scldm embed` wrote
    key: obsm entry that holds the embedding
    label: obs column that is to be read from the embedding
    held_out_by: obs column, such as donor: its labels are tested on cells of others
    device: torch device. Empty is a GPU where there is one
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
    cache_gb: float = checked(50.0, at_least=0)
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
    batch: int = checked(BATCH_CELLS, at_least=1)
    precision: Precision = "float32"
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
