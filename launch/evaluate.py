"""`scldm evaluate`: how good generated cells, an autoencoder or an embedding are, as a table and a file."""

from __future__ import annotations

from pathlib import Path

from launch.evaluation.config import EvaluateVerbConfig
from launch.judged import check_judged
from scldm.files import check_evaluation, write_json

PURPOSE = """
generated=FILE judges generated cells. Their distances to the test cells stand beside those of the training cells (the
floor) and of baselines drawn from them: pooled, per combination of conditions and per condition. It also judges
memorisation, responses to a treatment, marker genes and library sizes, and draws a map. It writes report.html,
evaluation.json and figures/*.png.
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


CONFIG = EvaluateVerbConfig
FIRST = (
    *("generated", "shards", "real", "out", "conditions"),
    *("model", "vae", "embedding", "label", "control"),
)


def main(config: EvaluateVerbConfig) -> dict:
    """Returns the evaluation, as in evaluation.json."""
    check_judged(config)
    if config.out:
        check_evaluation("out", config.out, has_page=bool(config.generated))
    if config.generated:
        from launch.evaluation.of_generated import evaluate_generated

        return evaluate_generated(config)
    if config.embedding:
        from launch.evaluation.of_embedding import evaluate_embedding, show

        evaluation = evaluate_embedding(config)
    else:
        from launch.evaluation.of_autoencoder import evaluate_vae, show

        evaluation = evaluate_vae(config)
    if config.out:  # before it is shown
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "evaluation.json", evaluation)
    show(evaluation)
    return evaluation
