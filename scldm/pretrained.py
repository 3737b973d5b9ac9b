"""A trained model as a scientist uses it: load, embed, generate. Needs neither deepspeed, mlflow nor tiledbsoma.

Reading order: load, Pretrained: embed, reconstruct, transform, generate, and how good that is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm import arguments as check
from scldm import draws
from scldm.batch import GeneCounts
from scldm.cells_file import storable
from scldm.count_matrix import check_adata, count_matrix, table_in_memory
from scldm.environment import install_hint
from scldm.errors import InputError
from scldm.files import check_writable
from scldm.flow.generate import solve
from scldm.flow.guidance import GuidedField
from scldm.flow.sampler import SamplerConfig
from scldm.flow.transform import blend, to_noise
from scldm.label_text import known_label
from scldm.library_size import LibrarySizeModel
from scldm.model.all_genes import encoder_of
from scldm.model.dit import DiT
from scldm.model.vae import VAE
from scldm.model_folder import check_files, read_config, read_gene_columns, read_history, save_pretrained
from scldm.networks import AskedPrecision, Kind, Networks, batch_on, precision_on, usable, written
from scldm.own_cells import Given, before, given_cells, kept_beside, var_of
from scldm.progress import Progress
from scldm.request import labels as asked
from scldm.request.cells import MOST_CELLS, Asked, table_of
from scldm.request.told_sizes import USUALLY_FAR, ToldSizes
from scldm.shown import as_html, as_text
from scldm.vocab import MIN_GENE_SHARE, ConditionVocab, GeneMatch, GeneVocab
from scldm.weights import network_of, read_weights, weights_hash

if TYPE_CHECKING:
    from scldm.comparison import Evaluation

SEEDS_OF_EVALUATE = 1 << 31  # as EvaluateConfig.seed
Pool = Literal["flat", "mean"]


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    *,
    batch: int | None = None,
    precision: AskedPrecision = "auto",
    min_gene_share: float = MIN_GENE_SHARE,
) -> Pretrained:
    """The model in a folder that `scldm export` wrote.

    device: torch device, such as cpu, cuda or cuda:1
    batch: cells that go through the networks at once. Another number changes the last bits, by the order of sums. None:
        64 on a CPU, on a GPU what a quarter of its memory holds
    precision: of the networks' matrix products. auto: bfloat16 on a GPU that has it, else float32. bfloat16 keeps 8
        bits of a number. Expected counts are then off by 0.6 % in the median, and 1 % of them by 3 % or more (cells of
        Kang et al.). Generated cells score the same (benchmarks/README.md). What is between the products, the flow's
        state and the draws are float32. `to` leaves it as it is
    min_gene_share: of the model's genes that cells must have to be embedded, reconstructed or transformed, 0 to 1.
        Cells with fewer are refused, since most often their genes are named otherwise

    Raises: InputError for a folder that is not one, is damaged, or of an unknown version.
    """
    folder = check.folder_of("folder", folder)
    usable(device)
    batch = None if batch is None else check.whole_of("batch", batch)
    check.one_of("precision", precision, AskedPrecision)
    min_gene_share = check.number_of("min_gene_share", min_gene_share, 0, 1)
    stored = read_config(folder)
    genes = GeneVocab.load(folder / "genes.json")
    conditions = ConditionVocab.load(folder / "conditions.json")
    path = folder / "model.safetensors"
    tensors = read_weights(path)
    own: dict[str, dict[str, Tensor]] = {"vae": {}, "ldm": {}}
    for key, value in tensors.items():
        net, _, name = key.partition("/")
        if net not in own or (net == "ldm" and stored.ldm is None):
            raise InputError(f"{path}: {key} belongs to no network that config.json names")
        own[net][name] = value
    of = stored.vae.portable
    vae = network_of(lambda: VAE(of, genes.n_genes), own["vae"], str(path)).eval().requires_grad_(False)
    dit = None
    if stored.ldm is not None:
        if unknown := sorted(set(stored.conditions) - set(conditions.names)):
            raise InputError(f"{folder}: config.json names the condition {unknown[0]!r}, conditions.json does not")
        n_labels = {name: conditions.n_labels(name) for name in stored.conditions}
        shape, of_ldm = (of.n_latents, of.latent_width), stored.ldm.portable
        dit = network_of(lambda: DiT.of_tensors(of_ldm, *shape, n_labels, own["ldm"]), own["ldm"], str(path))
        dit = dit.eval().requires_grad_(False)
    sizes = LibrarySizeModel.load(folder / "library_sizes.json")
    check_files(folder, stored, weights := weights_hash(tensors))
    batch = batch_on(device, vae) if batch is None else batch
    model = Pretrained(
        vae, dit, genes, conditions, sizes, stored.origin, weights, batch, precision_on(device, precision),
        read_gene_columns(folder, genes), read_history(folder), min_gene_share,
    )  # fmt: skip
    return model.to(device)


@dataclass(frozen=True, eq=False, repr=False)
class Pretrained(Networks):
    """A trained model, which takes and gives AnnData."""

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def save(self, folder: str | Path) -> None:
        """Write the model as a folder that `scldm.load` reads. A model that is there is replaced."""
        folder = check.folder_of("folder", folder)
        check_writable("folder", str(folder))
        if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
            raise InputError(f"folder={folder} is not empty and not a model folder. Choose another")
        rows = {stage: json.loads(str(table.to_json(orient="records"))) for stage, table in self.history.items()}
        columns = {str(name): list(column) for name, column in self.gene_columns.items()}
        save_pretrained(
            folder, self.vae, self.dit, self.genes, self.conditions, self.library_sizes, self.origin, rows, columns
        )

    # --- embed ---

    def embed(
        self, adata: ad.AnnData, *, layer: str | None = None, pool: Pool = "flat", key_added: str | None = None
    ) -> np.ndarray:
        """Posterior means of the cells' latent tokens, float32: (n, L * Z), tokens in order, or their mean (n, Z).

        adata: raw counts in X, layers["counts"] or raw.X, in memory, in a file (backed) or lazy. Genes are matched by
            `var_names`. Those that the model does not know are left out, and those that the file lacks make the set
            smaller. Counts in a file are read twice, some thousand cells at a time: once to check them all, then to
            compute. Those that a file holds by columns (CSC) are read whole
        layer: where the counts are, where that can't be found: X, raw or a layer's name
        key_added: write them to `adata.obsm[key_added]` too, and to `adata.uns["scldm"]` what made them. This is what
            `scldm embed` does. If a model made the cells, `before` keeps its record

        Raises: InputError for counts that are none, or no gene in common.
        """
        check.one_of("pool", pool, Pool)
        check_adata(adata)
        if key_added is not None:
            check.text_of("key_added", key_added, "X_scldm")
        if key_added is not None and adata.is_view:
            raise InputError(f"key_added={key_added!r}: adata is a view, which can't be added to. Give adata.copy()")
        given, given_ids = self._given(adata, layer)
        print(given.match, file=sys.stderr)
        encode = encoder_of(self.vae, given_ids, given.share_S)
        width = self.vae.config.latent_width * (1 if pool == "mean" else self.vae.config.n_latents)
        out = np.empty((adata.n_obs, width), np.float32)
        with Progress("embed", adata.n_obs, "cells") as bar, torch.no_grad(), self.computing():
            for rows, counts_BS in given.batches(self.batch):
                latent_BLZ = encode(self._here(counts_BS)).mean_BLZ.float()
                out[rows] = (latent_BLZ.mean(1) if pool == "mean" else latent_BLZ.flatten(1)).cpu().numpy()
                bar.advance(len(counts_BS))
        if key_added is not None:
            told = self.record("embed", pool=pool, **dict[str, Any](given.match.to_json()), **before(adata))
            adata.obsm[key_added], adata.uns["scldm"] = out, told
        return out

    def reconstruct(
        self, adata: ad.AnnData, *, layer: str | None = None, genes: Sequence[str] | None = None
    ) -> ad.AnnData:
        """Expected counts of the cells from their own latents, and how likely their counts are. The same cells are
        returned, with expected counts in `X`, float32, and obs["log_likelihood"], in nats over the file's genes that
        the model knows. obsm stays. So do var and layers, unless a gene is asked for that the file lacks. uns has the
        record of this call alone, with `before` as for `embed`.

        adata: raw counts, as for `embed`. A cell's library size is its total over those genes
        genes: which genes to write, in this order, any of the model's. The default is those of the file

        Raises: InputError as `embed`, for a gene that the model does not know, and where obs has such a column already.
        """
        check_adata(adata)
        if "log_likelihood" in adata.obs:
            raise InputError("obs has a column 'log_likelihood' already, which would be lost. Rename or remove it")
        given, given_ids = self._given(adata, layer)
        asked_ids = given_ids if genes is None else self._here(self.columns(genes) + 1)
        print(given.match, file=sys.stderr)
        var, at = var_of(self, adata, asked_ids.cpu().numpy())
        encode = encoder_of(self.vae, given_ids, given.share_S)
        expected, log_likelihood = np.empty((adata.n_obs, len(asked_ids)), np.float32), []
        with Progress("reconstruct", adata.n_obs, "cells") as bar, torch.no_grad(), self.computing():
            for rows, counts_BS in given.batches(self.batch):
                cells = GeneCounts(given_ids, self._here(counts_BS))
                latent_BLZ = encode(cells.counts_BS).mean_BLZ
                size_B = self.vae.library_size_B(cells.counts_BS.sum(1).float(), latent_BLZ, given_ids)
                whole = self.vae.decode(latent_BLZ, given_ids)
                log_likelihood.append(-whole.nll_B(cells, size_B).cpu().numpy())
                asked = whole if genes is None else self.vae.decode(latent_BLZ, asked_ids, among_ids=given_ids)
                expected[rows] = asked.expected(size_B).float().cpu().numpy()
                bar.advance(len(size_B))
        obs = storable(table_in_memory(adata.obs))
        obs["log_likelihood"] = np.concatenate(log_likelihood)
        told = self.record("reconstruct", **dict[str, Any](given.match.to_json()), **before(adata))
        made = ad.AnnData(expected, obs=obs, var=var, uns={"scldm": told})
        kept_beside(made, adata, at)
        return made

    def _given(self, adata: ad.AnnData, layer: str | None) -> tuple[Given, Tensor]:
        """The cells, and the vocabulary indices of their genes where the networks are."""
        given = given_cells(self, adata, layer)
        return given, self._here(given.ids_S)

    def matched(self, adata: ad.AnnData, layer: str | None = None) -> GeneMatch:
        """How many of the model's genes the cells have. Arguments and errors as for `embed`."""
        return self.genes.match(count_matrix(adata, layer).genes, "the cells", self.min_gene_share)

    def counted(self, adata: ad.AnnData, layer: str | None = None) -> np.ndarray:
        """Which cells have a count in any gene that the model knows, bool (n,): the others are refused by `embed`,
        `reconstruct` and `transform`. Arguments and errors as for `embed`."""
        return given_cells(self, adata, layer, empty_too=True).counted_n

    # --- transform ---

    @torch.no_grad()
    def transform(
        self,
        adata: ad.AnnData,
        to: Mapping[str, str],
        *,
        by: Sequence[str] | None = None,
        alphas: Sequence[float] = (1.0,),
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        layer: str | None = None,
        genes: Sequence[str] | None = None,
        kind: Kind = "counts",
    ) -> ad.AnnData:
        """The cells as they would be under other conditions, and on the way there. Their latents are taken to noise
        along the flow of their own conditions, and back along another. Library sizes stay the cells' own. The flow is
        told a size as usual for the labels as the cell's own is for its own.

        adata: raw counts, as for `embed`, and obs with the cells' own conditions
        to: condition -> label
        by: columns of obs that are the cells' own conditions, those of `to` among them. The default is all of the
            model's that obs has
        alphas: how far to go, cell after cell for each: 0 is the cells' own conditions, 1 the others. Between them the
            flow's velocities are averaged
        seed: of the counts' draws, which are the same for every alpha
        genes: which genes to write, in this order, any of the model's. The default is those of the file
        kind: counts, integers that are drawn, or means, expected counts, float32

        Returns the cells with obs `scldm_alpha` and `scldm_source`, the cell's name in `adata`. obsm is that of
        `adata`. So are var and layers, unless a gene is asked for that the file lacks. They say what the cells were
        before: layers with counts can be compared with X. Rows are repeated for each alpha. uns has the record of
        this call alone, with `before` as for `embed`. What a reader should know of the conditions is printed.
        Raises: InputError as `embed`, for unknown conditions and labels, and for SDE samplers.
        """
        sampler, dit = _sampler(sampler), self._dit()
        check.one_of("kind", kind, Kind)
        seed = check.seed_of(seed)
        to = check.mapping_of("to", to, '{"treatment": "stim"}')
        to = {
            name: known_label(check.label_of(f"to: {name}", label), self.conditions.labels.get(name, ()))
            for name, label in to.items()
        }
        check_adata(adata)
        obs = storable(table_in_memory(adata.obs))
        own = tuple(name for name in self.conditions.names if name in obs)
        by = own if by is None else check.names_of("by", by, "columns of obs", '["cell_type", "treatment"]')
        moves = asked.own_and_other(dit, self.conditions, obs, by, to, sampler, self.missing)
        for of in (moves.own, moves.by_flow):
            asked.check_sampler(dit, of, sampler, self.origin)
        alphas = check.numbers_of("alphas", alphas, 0, 1)
        given, given_ids = self._given(adata, layer)
        asked_ids = given_ids if genes is None else self._here(self.columns(genes) + 1)
        for note in (given.match, *moves.notes):
            print(note, file=sys.stderr)
        var, at = var_of(self, adata, asked_ids.cpu().numpy())
        encode = encoder_of(self.vae, given_ids, given.share_S)
        told_own = told_other = None
        if dit.config.library_size:
            told_own, told_other = (
                ToldSizes.of(self.library_sizes, moves.labels, of) for of in (moves.labels, moves.flow_labels)
            )
        n_evaluations = torch.zeros((), dtype=torch.int64, device=self.device)
        n_far = torch.zeros_like(n_evaluations)
        parts: list[list[sp.csr_matrix]] = [[] for _ in alphas]
        with Progress("transform", adata.n_obs * len(alphas), "cells") as bar, self.computing():
            for rows, counts_BS in given.batches(self.batch):
                dense_BS = self._here(counts_BS)
                latent_BLZ = encode(dense_BS).mean_BLZ
                size_B = self.vae.library_size_B(dense_BS.sum(1).float(), latent_BLZ, given_ids)
                z_BLZ = dit.standardise(latent_BLZ)
                of_own, by_flow = (
                    {k: torch.from_numpy(v[moves.row_n[rows]]) for k, v in of.items()}
                    for of in (moves.own, moves.by_flow)
                )
                way_BLZ = self._here(moves.ways.of(moves.row_n[rows]))
                row_B = self._here(moves.row_n[rows])
                n_far += 0 if told_own is None else told_own.far(size_B, row_B).sum()
                v_own, v_other = (
                    GuidedField(dit, of, sampler, told and told.tell(size_B, row_B).float())
                    for of, told in ((of_own, told_own), (by_flow, told_other))
                )
                noise_BLZ = to_noise(v_own, z_BLZ, sampler)
                keys_BQ = draws.keys(seed, "counts", torch.arange(rows.start, rows.stop, device=self.device), asked_ids)
                for alpha, part in zip(alphas, parts):
                    moved_BLZ = solve(blend(v_own, v_other, alpha), noise_BLZ, sampler) + alpha * way_BLZ
                    latent_BLZ = self.vae.normalised(dit.unstandardise(moved_BLZ))
                    predicted = self.vae.decode(latent_BLZ, asked_ids, among_ids=given_ids)
                    part.append(written(predicted, kind, size_B, keys_BQ))
                    bar.advance(len(size_B))
                for v in (v_own, v_other):
                    n_evaluations += (
                        v.n_evaluations_B.sum() if isinstance(v.n_evaluations_B, Tensor) else v.n_evaluations_B
                    )
        if (far := int(n_far)) > adata.n_obs * USUALLY_FAR:
            print(
                f"{far:,} of {adata.n_obs:,} cells have a library size that few training cells of their labels "
                "have, as of deeper data. The flow is told the nearest usual one. Counts keep the cells' own",
                file=sys.stderr,
            )
        matrix = sp.csr_matrix(sp.vstack([block for part in parts for block in part]))
        more: dict[str, Any] = {
            "kind": kind,
            "to": json.dumps(to),
            "n_evaluations": int(n_evaluations),
            **given.match.to_json(),
            **before(adata),
        }
        uns = self.record("transform", seed=seed, sampler=sampler, **more)
        moved = pd.concat([asked.moved_obs(dit, self.conditions, obs, to, alpha, len(alphas) > 1) for alpha in alphas])
        made = ad.AnnData(matrix, obs=moved, var=var, uns={"scldm": uns})
        kept_beside(made, adata, at, len(alphas))
        return made

    # --- generate ---

    def generate(
        self,
        conditions: Asked = None,
        *,
        n: int | None = None,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        genes: Sequence[str] | None = None,
        kind: Kind = "counts",
    ) -> ad.AnnData:
        """New cells in CSR, the conditions as categorical obs. For as many as fit into memory. `scldm generate` writes
        any number.

        conditions: a DataFrame with one row per cell and one column per condition to be given. Or a mapping, as
            {"cell_type": "CD19+ B"}, of which n cells are made. Or an AnnData, whose cells' conditions are taken
            from obs. Or nothing, for n cells of no condition. Every label must be one that the model was trained on. A
            condition that is not named is not given. A column `library_size` of a DataFrame sets the cells' expected
            total counts. Else they are drawn from what was fitted on the training cells of the same conditions
        n: how many cells, where `conditions` does not say so
        seed: of all draws. A cell's depend on it and on the cell's row number, not on the other cells (within its
            tolerance with sampler.method=adaptive, whose steps are those of a batch)
        genes: which genes to write, in this order. The default is all of the model's
        kind: counts, integers drawn from what the decoder predicts, or means, its expected counts, float32

        A cell's name is `generated-CALL-NUMBER`. CALL stands for model, conditions, sampler and seed: cells of several
        calls can be joined by `anndata.concat`, and the same call gives the same names.

        Raises: InputError for a condition or label that the model does not know, or library sizes never fitted.
        """
        sampler, dit = _sampler(sampler), self._dit()
        check.one_of("kind", kind, Kind)
        seed = check.seed_of(seed)
        wanted = self.check_conditions(table_of(conditions, n, list(dit.n_labels)), seed, sampler)
        for note in wanted.notes:
            print(note, file=sys.stderr)
        columns = self.columns(genes)
        every = range(wanted.n_cells)
        with Progress("generate", wanted.n_cells, "cells") as bar:
            matrix, n_evaluations_n = self.make(wanted, every, columns, sampler, kind, bar.advance)
        obs = self.obs(wanted, sampler, wanted.library_size(every))
        n_evaluations = int(n_evaluations_n.sum())
        uns = self.record("generate", seed=seed, sampler=sampler, kind=kind, n_evaluations=n_evaluations, **wanted.told)
        return ad.AnnData(matrix, obs=obs, var=self.var(columns), uns={"scldm": uns})

    # --- how good it is ---

    def evaluate(
        self,
        generated: ad.AnnData,
        real: ad.AnnData,
        *,
        conditions: Sequence[str] | None = None,
        split: str = "scldm_split",
        layer: str | None = None,
        control: Mapping[str, str] | None = None,
        protocol: Literal["scldm", "cfgen"] = "scldm",
        seed: int = 0,
    ) -> Evaluation:
        """Generated cells against the real test cells: the tables and figures of `scldm evaluate`.

        generated: counts in X and the conditions in obs, as `generate` gives them
        real: raw counts, found as for `embed`, the conditions in obs, and the column `split`, which says train,
            validation or test of every cell. Others are left out. `scldm.fit` has written it
        conditions: by which cells are told apart. The default is all of the model's
        control: condition -> the label that its responses start from. A usual name, such as control, is found
        protocol: how cells are compared: scldm, or cfgen, as the published tables are

        Raises: InputError for cells that can't be compared. Needs the extra `evaluate`.
        """
        try:
            from scldm.comparison import evaluation  # takes seconds to import
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise InputError(f"evaluate needs the package {package}. {install_hint(package)}") from error
        names = self.conditions.names if self.dit is None else tuple(self.dit.n_labels)
        if conditions is not None:
            names = check.names_of("conditions", conditions, "conditions", '["cell_type"]')
        control = check.mapping_of("control", control or {}, '{"treatment": "control"}')
        check_adata(generated, "generated")
        check_adata(real, "real")
        split, seed = check.text_of("split", split, "scldm_split"), check.seed_of(seed, SEEDS_OF_EVALUATE)
        return evaluation(generated, real, names, split, layer, control, protocol, seed, self)

    def log_fold_changes(
        self,
        condition: str,
        a: str,
        b: str,
        *,
        by: Sequence[str] = (),
        n: int = 500,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        genes: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """How genes change from label a of a condition to label b, from generated cells. There is one row for each
        gene, or for each combination of the labels of `by` and gene.

        by: other conditions: changes for each combination of their labels that a training cell had
        n: generated cells of each label, and combination

        Columns: those of `by`, gene, log2_fold_change of the means of counts per 10,000, each plus 1, and z of the
        rank-sum test between the two sets. z grows with n: it says how sure the change of the model is, not how true.
        `attrs["scldm"]` keeps seed and sampler.
        Raises: InputError as `generate`.
        """
        from scldm.comparison import gene_changes

        by, dit = check.names_of("by", by, "conditions", '["cell_type"]'), self._dit()
        condition = check.text_of("condition", condition, "treatment")
        n, seed, sampler = check.whole_of("n", n, 2, MOST_CELLS // 2), check.seed_of(seed), _sampler(sampler)
        a, b = check.label_of("a", a), check.label_of("b", b)
        for name in (condition, *by):
            if name not in dit.n_labels:
                raise InputError(f"condition {name!r} is unknown. The model knows {', '.join(dit.n_labels) or 'none'}")
        if condition in by:
            raise InputError(f"by names {condition!r}, which is the condition that changes. Leave it out")
        columns = [list(dit.n_labels).index(name) for name in by]
        trained = dit.combinations.labels_KC[:, columns].unique(dim=0).tolist() if by else [[]]
        if not trained:
            raise InputError(f"by={list(by)}: the model knows no combination that a training cell had. Leave by out")
        tables = []
        for ids in trained:
            own = {name: self.conditions.labels[name][k] for name, k in zip(by, ids, strict=True)}
            asked_of = pd.DataFrame([{**own, condition: label} for label in (a, b)]).iloc[np.repeat([0, 1], n)]
            cells = self.generate(asked_of, seed=seed, sampler=sampler, genes=genes)
            table = gene_changes(cast(sp.csr_matrix, cells.X), cells.var_names, n)
            tables.append(table.assign(**own)[[*by, *table.columns]])
        found = pd.concat(tables, ignore_index=True)
        found.attrs["scldm"] = self.record("log_fold_changes", seed=seed, sampler=sampler, n=n)
        return found


def _sampler(sampler: SamplerConfig | None) -> SamplerConfig:
    if sampler is not None and not isinstance(sampler, SamplerConfig):
        raise InputError(f"sampler={sampler!r} must be a scldm.SamplerConfig, as scldm.SamplerConfig(n_steps=20)")
    return sampler or SamplerConfig()
