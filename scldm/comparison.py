"""What `model.evaluate` and `model.log_fold_changes` find: cells in AnnData compared, as tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scldm.arguments import folder_of
from scldm.count_matrix import count_matrix, rows_in_memory, table_in_memory
from scldm.environment import made_with
from scldm.errors import InputError
from scldm.evaluate.baselines import SHIFTED
from scldm.evaluate.cells import Cells
from scldm.evaluate.changes import Blocks, Pair
from scldm.evaluate.compare import compare
from scldm.evaluate.config import EvaluateConfig
from scldm.evaluate.curves import curves_of
from scldm.evaluate.figures import FIGURES, has
from scldm.evaluate.figures.looks import style
from scldm.evaluate.figures.scores import all_baselines_of, score_sections
from scldm.evaluate.intervals import WIDTH
from scldm.evaluate.metrics import METRICS
from scldm.evaluate.protocols import PROTOCOLS
from scldm.evaluate.report import matched_text, write_report
from scldm.evaluate.sample import SPLITS, check_splits
from scldm.files import check_evaluation, write_json
from scldm.label_text import labels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scldm.networks import Networks


def evaluation(
    generated: ad.AnnData,
    real: ad.AnnData,
    conditions: Sequence[str],
    split: str,
    layer: str | None,
    control: Mapping[str, str],
    protocol: str,
    seed: int,
    model: Networks,
) -> Evaluation:
    """Arguments as for `Pretrained.evaluate`.

    model: its loss curves and hash are kept, and it knows the labels of missing values
    """
    if not isinstance(protocol, str) or protocol not in PROTOCOLS:
        raise InputError(f"protocol={protocol!r} must be one of {', '.join(map(repr, PROTOCOLS))}")
    of_cell = labels_of(table_in_memory(real.obs), split, "real", "split")
    check_splits(of_cell, "real", split)
    known = {name: model.missing.get(name, "") for name in conditions}
    parts = [_cells(real, np.flatnonzero(of_cell == name), known, layer, f"real ({name})") for name in SPLITS]
    made = _cells(generated, np.arange(generated.n_obs), known, "X", "generated")
    found = compare(parts[0], parts[1], parts[2], made, EvaluateConfig(seed=seed), protocol, control)
    rows = {stage: table.to_dict("records") for stage, table in model.history.items()}
    found["curves"] = {
        stage: curves_of({str(k): v for k, v in row.items()} for row in of) for stage, of in rows.items()
    }
    found["made_with"] = made_with({"conditions": ", ".join(conditions), "protocol": protocol, "model": model.hash})
    return Evaluation(found)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What was found of generated cells.

    numbers: all of it, as evaluation.json holds it
    """

    numbers: dict[str, Any]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """By name. `per_combination` and `pooled` have a row for each score, with the reach of its 95 % interval, the
        floor and every baseline. Then `memorisation`, and `response to NAME` of each condition that has one.
        Combinations that were not trained count in none of these. `unseen: NAME` has theirs, beside the baseline that
        is made for them."""
        found = self.numbers
        titles = {key: title for key, (title, _) in all_baselines_of(found).items()}
        tables = {
            section: pd.DataFrame(
                {
                    METRICS[name].title: {
                        "generated": row["score"],
                        "± 95 %": None if row["error"] is None else WIDTH * row["error"],
                        "floor": row["floor"]["mean"],
                        **{titles[key]: of["mean"] for key, of in row["baselines"].items()},
                    }
                    for name, row in found[section].items()
                }
            ).T
            for section in score_sections(found)
        }
        tables["memorisation"] = pd.DataFrame(found["memorisation"]).T
        for condition, response in found["response"].items():
            if response["pooled"]:
                tables[f"response to {condition}"] = pd.DataFrame(response["pooled"]).T
            if response["unseen"]:
                tables[f"response to {condition}, unseen"] = pd.DataFrame(response["unseen"]).T
        for name in (t for t in found["set_apart"] if t in found.get("by_combination", {})):
            tables[f"unseen: {name}"] = pd.DataFrame(
                {
                    METRICS[metric].title: {
                        "generated": row["score"],
                        **{titles[key]: of["mean"] for key, of in row["baselines"].items() if key == SHIFTED[0]},
                    }
                    for metric, row in found["by_combination"][name].items()
                }
            ).T
        return tables

    @property
    def verdict(self) -> str:
        return f"{self.numbers['verdict']['says']} {self.numbers['verdict']['next']}"

    @property
    def figures(self) -> list[str]:
        """The figures that there are."""
        return [name for name in FIGURES if has(self.numbers, name)]

    def figure(self, name: str) -> Figure:
        """Raises: InputError for a figure that there is not."""
        if name not in self.figures:
            raise InputError(f"figure {name!r} is not there. There are {', '.join(self.figures)}")
        with style():
            return FIGURES[name](self.numbers)

    def save(self, folder: str | Path) -> Path:
        """Write report.html, its figures and evaluation.json. Returns the page.

        Raises: InputError for a folder where this would replace what no evaluation has made.
        """
        folder = folder_of("folder", folder)
        check_evaluation("folder", str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "evaluation.json", self.numbers)  # which says that the others are its own
        return write_report(self.numbers, folder)[0]

    def __repr__(self) -> str:
        tables = (f"{name}\n{table.to_string(float_format='{:.3g}'.format)}" for name, table in self.tables.items())
        return "\n\n".join([self.verdict, matched_text(self.numbers), *tables])

    def _repr_html_(self) -> str:
        said = pd.Series([self.verdict, matched_text(self.numbers)]).to_frame("verdict").to_html(index=False)
        tables = (
            table.rename_axis(columns=name).to_html(float_format="{:.3g}".format) for name, table in self.tables.items()
        )
        return "".join([said, *tables])


def gene_changes(counts: sp.csr_matrix, genes: pd.Index, n: int) -> pd.DataFrame:
    """How each gene differs between the first n cells and those after them: gene, log2_fold_change, z."""
    rng = np.random.default_rng(0)
    control, treated = (Blocks.of_counts(sp.csr_matrix(part), rng) for part in (counts[:n], counts[n:]))
    pair = Pair(treated, control)
    return pd.DataFrame({"gene": genes.astype(str), "log2_fold_change": pair.change, "z": pair.z})


def _cells(adata: ad.AnnData, rows: np.ndarray, known: Mapping[str, str], layer: str | None, name: str) -> Cells:
    """known: condition -> the label that training gave its missing values, or nothing"""
    found = count_matrix(adata, layer, name)
    obs = table_in_memory(adata.obs)
    labels = {of: labels_of(obs, of, name, "condition", missing=label)[rows] for of, label in known.items()}
    return Cells.of_labels(rows_in_memory(found.matrix, rows), labels, tuple(found.genes), name)
