"""A trained model as a scientist uses it: load, embed, generate. Needs neither deepspeed, mlflow nor tiledbsoma.

Reading order: load, Made, Pretrained.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm import draws
from scldm.batch import GeneCounts
from scldm.errors import InputError, read_json
from scldm.flow.generate import SamplerConfig, generate_latents, guided
from scldm.flow.shift import way
from scldm.flow.transform import blend, from_noise, to_noise
from scldm.library_size import LibrarySizeModel
from scldm.model.all_genes import encoder_of
from scldm.model.attention import Choice
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, Predicted, VAEConfig, chosen
from scldm.model_folder import FORMAT_VERSION
from scldm.progress import Progress
from scldm.request import labels as asked
from scldm.request.wanted import Wanted, distinct
from scldm.vocab import ConditionVocab, GeneVocab
from scldm.weights import put_in, read_weights, weights_hash

NOT_GIVEN = "not given"
MAX_COUNT = 2**31 - 1  # of int32, as cells are given to the encoder and written
Kind = Literal["counts", "means"]
Precision = Literal["float32", "bfloat16"]
BATCH_CELLS = 64  # on a CPU
# on a GPU a batch takes up to a quarter of its memory, beside tiles and weights: 256 cells of 36,130 genes in 80 GB
BATCH_SHARE, MOST_CELLS = 1 / 4, 1_024


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    *,
    batch: int | None = None,
    precision: Precision = "float32",
) -> Pretrained:
    """The model in a folder that `scldm export` wrote.

    device: torch device, such as cpu, cuda or cuda:1
    batch: cells that go through the networks at once; another number is another order of sums, in the last bits. None:
        64 on a CPU, on a GPU what a quarter of its memory holds
    precision: of the networks' matrix products. bfloat16, for GPUs, differs: it keeps 8 bits of a number,
        so that expected counts are off by 0.6 % (median; 1 % of them by 3 % or more; cells of Kang et al.). What is
        between the products, the flow's state and the draws are float32

    Raises: InputError for a folder that is not one, is damaged, or of an unknown version.
    """
    folder = Path(folder)
    usable(device)
    if batch is not None and batch < 1:
        raise InputError(f"batch={batch} must be at least 1")
    if precision not in get_args(Precision):
        raise InputError(f"precision={precision} must be one of {', '.join(get_args(Precision))}")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json; `scldm export` writes one")
    config = read_json(folder / "config.json")
    if config.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder}: format version {config.get('format_version')!r}; this scldm reads {FORMAT_VERSION}"
        )
    genes = GeneVocab.load(folder / "genes.json")
    conditions = ConditionVocab.load(folder / "conditions.json")
    tensors = read_weights(folder / "model.safetensors")
    vae = VAE(VAEConfig(**config["vae"]).portable, genes.n_genes)
    put_in(vae, tensors, "vae", folder)
    dit = None
    if config["ldm"] is not None:
        n_labels = {name: conditions.n_labels(name) for name in config["conditions"]}
        own = {key.removeprefix("ldm/"): value for key, value in tensors.items() if key.startswith("ldm/")}
        shape = vae.config.n_latents, vae.config.latent_width
        dit = DiT.of_tensors(DiTConfig(**config["ldm"]).portable, *shape, n_labels, own)
        put_in(dit, tensors, "ldm", folder)
        dit = dit.eval().requires_grad_(False)
    sizes = LibrarySizeModel.load(folder / "library_sizes.json")
    vae = vae.eval().requires_grad_(False)
    batch = batch_on(device, vae) if batch is None else batch
    model = Pretrained(vae, dit, genes, conditions, sizes, config["origin"], weights_hash(tensors), batch, precision)
    return model.to(device)


def batch_on(device: str | torch.device, vae: VAE) -> int:
    """Cells of a batch that is to decode all genes, a power of two: GPUs of one kind take the same.

    A cell has for each gene five numbers a pair of a head and a latent token (weights, and what goes into a norm's
    variance), and of its counts and their draws 64 at most.
    """
    if torch.device(device).type != "cuda":
        return BATCH_CELLS
    pairs = vae.config.decoder_cross_heads * vae.config.n_latents
    fits = BATCH_SHARE * torch.cuda.get_device_properties(device).total_memory / (4 * vae.n_genes * (5 * pairs + 64))
    return min(MOST_CELLS, 1 << max(0, math.floor(math.log2(max(fits, 1)))))


def usable(device: str | torch.device) -> None:
    """Raises: InputError for a device that torch does not know, or that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise InputError(f"device={device}: {str(error).splitlines()[0]}") from None


class Made(NamedTuple):
    """matrix: (n, genes) int32 counts or float32 means; n_evaluations_n: of the network for each cell, int32"""

    matrix: sp.csr_matrix
    n_evaluations_n: np.ndarray


@dataclass(frozen=True)
class Pretrained:
    """Autoencoder, diffusion transformer and what they need to know of genes, conditions and library sizes; batch and
    precision as for `load`."""

    vae: VAE
    dit: DiT | None
    genes: GeneVocab
    conditions: ConditionVocab
    library_sizes: LibrarySizeModel
    origin: dict[str, Any]
    hash: str
    batch: int = BATCH_CELLS
    precision: Precision = "float32"

    @property
    def made_by(self) -> dict[str, str | int]:
        """What of the model decides its numbers: of uns["scldm"] of a file."""
        return {"model": self.hash, "batch": self.batch, "precision": self.precision, "attention": self.attention.way}

    @property
    def device(self) -> torch.device:
        return self.vae.latent_queries.device

    @property
    def attention(self) -> Choice:
        """How the autoencoder's attention is computed here, and why."""
        return self.attention_on(self.device)

    def attention_on(self, device: str | torch.device) -> Choice:
        return chosen(self.vae.config, torch.device(device), getattr(torch, self.precision))

    def to(self, device: str | torch.device) -> Pretrained:
        """The same model on another device; its networks are moved, not copied."""
        return replace(self, vae=self.vae.to(device), dit=self.dit and self.dit.to(device))

    def _computing(self) -> torch.autocast:
        """Within, the networks compute in `precision`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _here(self, numbers: np.ndarray) -> Tensor:
        """Numbers of our own on the model's device; the host does not wait for what the device does before."""
        return torch.from_numpy(numbers).to(self.device, non_blocking=True)

    def _batches(self, n: int) -> Iterator[slice]:
        for start in range(0, n, self.batch):
            yield slice(start, min(start + self.batch, n))

    # --- embed ---

    def embed(
        self, adata: ad.AnnData, *, layer: str | None = None, pool: Literal["flat", "mean"] = "flat"
    ) -> np.ndarray:
        """Posterior means of the cells' latent tokens, float32: (n, L * Z), tokens in order, or their mean (n, Z).

        adata: raw counts in `X`, in `layers[layer]`, or in `raw.X` for layer `raw`. Genes are matched by `var_names`;
            those that the model does not know are left out, and those that the file lacks simply make the set smaller

        Raises: InputError for counts that are none, or no gene in common.
        """
        counts, gene_ids = self._given(adata, layer)
        encode = encoder_of(self.vae, gene_ids, counts.getnnz(0) / adata.n_obs)
        out = []
        with Progress("embed", adata.n_obs, "cells") as bar, torch.no_grad(), self._computing():
            for rows in self._batches(adata.n_obs):
                dense_BS = self._here(counts[rows].toarray())
                latent_BLZ = encode(dense_BS).mean_BLZ.float()
                out.append((latent_BLZ.mean(1) if pool == "mean" else latent_BLZ.flatten(1)).cpu().numpy())
                bar.advance(len(dense_BS))
        return np.concatenate(out)

    def reconstruct(
        self, adata: ad.AnnData, *, layer: str | None = None, genes: Sequence[str] | None = None
    ) -> ad.AnnData:
        """Expected counts of the cells from their own latents, and how likely their counts are: the same cells with
        expected counts in `X`, float32, and obs["log_likelihood"], in nats over the file's genes that the model knows.

        adata: raw counts, as for `embed`; a cell's library size is its total over those genes
        genes: which genes to write, in this order, any of the model's; the default is those of the file

        Raises: InputError as `embed`, for a gene that the model does not know, and where obs has such a column already.
        """
        if "log_likelihood" in adata.obs:
            raise InputError("obs has a column 'log_likelihood' already, which would be lost; rename or remove it")
        counts, given_ids = self._given(adata, layer)
        asked_ids = given_ids if genes is None else self._here(self.columns(genes) + 1)
        encode = encoder_of(self.vae, given_ids, counts.getnnz(0) / adata.n_obs)
        expected, log_likelihood = [], []
        with Progress("reconstruct", adata.n_obs, "cells") as bar, torch.no_grad(), self._computing():
            for rows in self._batches(adata.n_obs):
                given = GeneCounts(given_ids, self._here(counts[rows].toarray()))
                latent_BLZ = encode(given.counts_BS).mean_BLZ
                size_B = self.vae.library_size_B(given.counts_BS.sum(1).float(), latent_BLZ, given_ids)
                whole = self.vae.decode(latent_BLZ, given_ids)
                log_likelihood.append(-whole.nll_B(given, size_B).cpu().numpy())
                asked = whole if genes is None else self.vae.decode(latent_BLZ, asked_ids, among_ids=given_ids)
                expected.append(asked.expected(size_B).float().cpu().numpy())
                bar.advance(len(size_B))
        obs = pd.DataFrame(adata.obs, copy=True)
        obs["log_likelihood"] = np.concatenate(log_likelihood)
        var = pd.DataFrame(index=pd.Index([self.genes.ids[k - 1] for k in asked_ids.tolist()]))
        return ad.AnnData(np.concatenate(expected), obs=obs, var=var, uns={"scldm": self.made_by})

    def counted(self, adata: ad.AnnData, layer: str | None = None) -> np.ndarray:
        """Which cells have a count in any gene that the model knows, bool (n,): the others are refused by `embed`,
        `reconstruct` and `transform`. Arguments and errors as for `embed`."""
        return self._given(adata, layer, empty_too=True)[0].getnnz(1) > 0

    def _given(self, adata: ad.AnnData, layer: str | None, empty_too: bool = False) -> tuple[sp.csr_matrix, Tensor]:
        """Counts of the genes that the model knows, and their indices."""
        run = self.origin.get("vae", {}).get("config", {})
        policy = run.get("data", {}).get("given", {}).get("policy")
        if policy in ("expressed", "expressed_plus_zeros"):
            raise InputError(
                f"this autoencoder was trained with data.given.policy={policy} and is given all genes of a file here, "
                f"which is another function; `scldm encode` with genes.policy={policy} encodes cells as it was trained"
            )
        if layer in ("raw", "raw/X") and adata.raw is not None:
            adata, layer = adata.raw.to_adata(), None
        if layer is not None and layer not in adata.layers:
            there = [*(["raw"] if adata.raw is not None else []), *adata.layers]
            raise InputError(f"layer {layer!r} is not there; there are X{''.join(f', {name}' for name in there)}")
        if adata.n_obs == 0:
            raise InputError("there are no cells to embed")
        if not adata.var_names.is_unique:
            twice = adata.var_names[adata.var_names.duplicated()][0]
            raise InputError(f"gene {twice!r} stands twice in var_names; they must be unique")
        index = self.genes.lookup(adata.var_names)
        if not index.any():
            raise InputError(
                f"none of the {adata.n_vars} genes (such as {adata.var_names[0]!r}) is among the model's "
                f"{self.genes.n_genes} (such as {self.genes.ids[0]!r}); they are {self.genes.namespace} ids"
            )
        matrix = adata.layers[layer] if layer is not None else adata.X
        if matrix is None:
            raise InputError("X is empty; name the layer that holds the counts")
        counts = sp.csr_matrix(matrix)[:, index > 0]
        counts.eliminate_zeros()
        wrong = counts.data[~((counts.data >= 0) & (counts.data <= MAX_COUNT) & (counts.data == np.rint(counts.data)))]
        if len(wrong):
            raise InputError(f"{layer or 'X'} holds {wrong[0]:g}, which is not a count; give raw counts")
        empty = int((counts.getnnz(1) == 0).sum())
        if empty and not empty_too:
            raise InputError(
                f"{empty} of {adata.n_obs} cells have no count in any gene that the model knows; drop_empty=true "
                "leaves them out, in Python adata[model.counted(adata)]"
            )
        return counts.astype(np.int32), self._here(index[index > 0])

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
        """The cells as they would be under other conditions, and on the way there: their latents taken to noise along
        the flow of their own conditions, and back along another. Library sizes stay the cells' own.

        adata: raw counts, as for `embed`, and obs with the cells' own conditions
        to: condition -> label
        by: columns of obs that are the cells' own conditions, those of `to` among them; the default is all of the
            model's that obs has
        alphas: how far to go, cell after cell for each: 0 is the cells' own conditions, 1 the others; between them the
            flow's velocities are averaged
        seed: of the counts' draws, which are the same for every alpha
        genes: which genes to write, in this order, any of the model's; the default is those of the file
        kind: counts, integers that are drawn, or means, expected counts, float32

        Returns the cells with obs `scldm_alpha` and `scldm_source`, the cell's name in `adata`. What a reader should
        know of the conditions is printed.
        Raises: InputError as `embed`, for unknown conditions and labels, and for SDE samplers.
        """
        sampler, dit = sampler or SamplerConfig(), self._dit()
        obs = pd.DataFrame(adata.obs)
        by = [name for name in self.conditions.names if name in obs] if by is None else list(by)
        moves = asked.own_and_other(dit, self.conditions, obs, by, to, sampler)
        for of in (moves.own, moves.by_flow):
            asked.check_sampler(dit, of, sampler, self.origin)
        if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
            raise InputError(f"alphas={', '.join(map(str, alphas))} must be numbers from 0 to 1, at least one")
        counts, given_ids = self._given(adata, layer)
        asked_ids = given_ids if genes is None else self._here(self.columns(genes) + 1)
        for note in moves.notes:
            print(note, file=sys.stderr)
        encode = encoder_of(self.vae, given_ids, counts.getnnz(0) / adata.n_obs)
        n_evaluations = torch.zeros((), dtype=torch.int64, device=self.device)
        parts: list[list[sp.csr_matrix]] = [[] for _ in alphas]
        with Progress("transform", adata.n_obs * len(alphas), "cells") as bar, self._computing():
            for rows in self._batches(adata.n_obs):
                dense_BS = self._here(counts[rows].toarray())
                latent_BLZ = encode(dense_BS).mean_BLZ
                size_B = self.vae.library_size_B(dense_BS.sum(1).float(), latent_BLZ, given_ids)
                z_BLZ = dit.standardise(latent_BLZ)
                of_own, by_flow, of_other = (
                    {k: torch.from_numpy(v[moves.row_n[rows]]) for k, v in of.items()}
                    for of in (moves.own, moves.by_flow, moves.other)
                )
                way_BLZ = way(dit, by_flow, of_other) if sampler.guidance == "shift" else 0.0
                v_own, v_other = (guided(dit, of, sampler) for of in (of_own, by_flow))
                noise_BLZ = to_noise(v_own, z_BLZ, sampler)
                keys_BQ = draws.keys(seed, "counts", torch.arange(rows.start, rows.stop, device=self.device), asked_ids)
                for alpha, part in zip(alphas, parts):
                    moved_BLZ = from_noise(blend(v_own, v_other, alpha), noise_BLZ, sampler) + alpha * way_BLZ
                    latent_BLZ = self.vae.normalised(dit.unstandardise(moved_BLZ))
                    predicted = self.vae.decode(latent_BLZ, asked_ids, among_ids=given_ids)
                    part.append(written(predicted, kind, size_B, keys_BQ))
                    bar.advance(len(size_B))
                for v in (v_own, v_other):
                    n_evaluations += (
                        v.n_evaluations_B.sum() if isinstance(v.n_evaluations_B, Tensor) else v.n_evaluations_B
                    )
        matrix = sp.csr_matrix(sp.vstack([block for part in parts for block in part]))
        config = json.dumps({"to": dict(to), "sampler": asdict(sampler)})
        uns = {**self.made_by, "seed": seed, "config": config, "n_evaluations": int(n_evaluations)}
        moved = pd.concat([asked.moved_obs(dit, self.conditions, obs, to, alpha, len(alphas) > 1) for alpha in alphas])
        return ad.AnnData(matrix, obs=moved, var=self.var(asked_ids.cpu().numpy() - 1), uns={"scldm": uns})

    # --- generate ---

    def generate(
        self,
        conditions: pd.DataFrame,
        *,
        seed: int,
        sampler: SamplerConfig | None = None,
        genes: Sequence[str] | None = None,
        kind: Kind = "counts",
    ) -> ad.AnnData:
        """New cells, one per row of `conditions`, in CSR, the conditions as categorical obs. For as many as fit into
        memory; `scldm generate` writes any number.

        conditions: one column per condition to be given, in which every label is one that the model was trained on; a
            condition without a column is not given. A column `library_size` sets the cells' expected total counts;
            without it they are drawn from what was fitted on the training cells of the same conditions
        seed: of all draws; a cell's depend on it and on the cell's row number, not on the other cells (within its
            tolerance with sampler.method=adaptive, whose steps are those of a batch)
        genes: which genes to write, in this order; the default is all of the model's
        kind: counts, integers drawn from what the decoder predicts, or means, its expected counts, float32

        Raises: InputError for a condition or label that the model does not know, or library sizes never fitted.
        """
        sampler = sampler or SamplerConfig()
        wanted = self.check_conditions(conditions, seed, sampler)
        for note in wanted.notes:
            print(note, file=sys.stderr)
        columns = self.columns(genes)
        every = range(wanted.n_cells)
        with Progress("generate", wanted.n_cells, "cells") as bar:
            matrix, n_evaluations_n = self.make(wanted, every, columns, sampler, kind, bar.advance)
        obs = self.obs(wanted, wanted.library_size(every))
        uns = {
            **self.made_by,
            "seed": seed,
            "sampler": asdict(sampler),
            "n_evaluations": int(n_evaluations_n.sum()),
        }
        return ad.AnnData(matrix, obs=obs, var=self.var(columns), uns={"scldm": uns})

    def check_conditions(self, conditions: pd.DataFrame, seed: int, sampler: SamplerConfig | None = None) -> Wanted:
        """The cells to make, or the error that generation would meet; arguments as for `generate`."""
        dit = self._dit()
        if not 0 <= seed < 2**63:
            raise InputError(f"seed={seed} must be at least 0 and below 2^63")
        if len(conditions) == 0:
            raise InputError("there are no cells to generate: the table of conditions is empty")
        combination_n, labels = distinct(conditions.drop(columns="library_size", errors="ignore"))
        ids, labels = asked.encode_labels(dit, self.conditions, labels)
        sampler = sampler or SamplerConfig()
        base = asked.base_of(dit, ids, sampler)
        asked.check_sampler(dit, base, sampler, self.origin)
        notes = asked.without_token(dit, base, labels)
        notes += asked.of_other_labels(dit, self.conditions, base, ids, labels, asked.DRAWN)
        if "library_size" in conditions:
            sizes = np.array(pd.to_numeric(conditions["library_size"], errors="coerce"), dtype=np.float64)
            if not (np.isfinite(sizes).all() and (sizes > 0).all()):
                raise InputError("column library_size must hold positive numbers")
            return Wanted(seed, combination_n, labels, ids, base, sizes, notes=notes)
        log_mean_n, log_std_n, backed_off = self.library_sizes.of(labels)
        return Wanted(seed, combination_n, labels, ids, base, None, log_mean_n, log_std_n, (*notes, *backed_off))

    @torch.no_grad()
    def make(
        self,
        wanted: Wanted,
        rows: range,
        columns: np.ndarray,
        sampler: SamplerConfig,
        kind: Kind,
        tick: Callable[[int], None],
    ) -> Made:
        """Some of the cells, (rows, columns).

        Batches begin at multiples of `batch` and are filled up: a float sum depends on the shape of its batch, so a
        cell's numbers are the same bit for bit whatever rows are asked for with it, by whichever rank; with as many
        threads of torch, which share a sum's terms, and on the same kind of device. So they are whatever genes are
        asked for: the decoder scores every gene, as a share is one of all; counts are drawn of the asked ones alone.

        columns: of the model's genes, as `columns` gives them
        tick: called with the number of cells that were made
        """
        columns_Q = self._here(columns.copy())
        parts, n_evaluations = [], []
        for first in range(rows.start // self.batch * self.batch, rows.stop, self.batch):
            batch = range(first, first + self.batch)
            numbers_B = torch.arange(batch.start, batch.stop, device=self.device)
            of_batch = {name: torch.from_numpy(ids) for name, ids in wanted.ids_of(batch).items()}
            of_base = of_batch
            if wanted.base_ids is not wanted.ids:
                of_base = {name: torch.from_numpy(ids) for name, ids in wanted.base_ids_of(batch).items()}
            with self._computing():
                drawn = generate_latents(self._dit(), of_batch, numbers_B, wanted.seed, sampler, of_base)
            size_B = self._here(wanted.library_size(batch).astype(np.float32))
            own = slice(max(rows.start - first, 0), rows.stop - first)
            parts.append(self.decoded(drawn.latent_BLZ, columns_Q, size_B, numbers_B, wanted.seed, kind)[own])
            n_evaluations.append(drawn.n_evaluations_B[own].int().cpu().numpy())
            tick(parts[-1].shape[0])
        return Made(sp.csr_matrix(sp.vstack(parts)), np.concatenate(n_evaluations))

    @torch.no_grad()
    def decoded(
        self, latent_BLZ: Tensor, columns_Q: Tensor, library_size_B: Tensor, numbers_B: Tensor, seed: int, kind: Kind
    ) -> sp.csr_matrix:
        """Generated latents as what is written of them, (B, Q)."""
        all_genes_G = torch.arange(1, self.genes.n_genes + 1, device=self.device)
        with self._computing():
            predicted = self.vae.decode(self.vae.normalised(latent_BLZ), all_genes_G).take(columns_Q)
        return written(predicted, kind, library_size_B, draws.keys(seed, "counts", numbers_B, all_genes_G[columns_Q]))

    def nonzeros_a_cell(self, wanted: Wanted, columns: np.ndarray, kind: Kind) -> float:
        """How many values a cell has to be stored: those of one cell at the mean latent, of average library size."""
        if kind == "means":
            return len(columns)
        sizes = wanted.library_size(range(min(wanted.n_cells, 1000)))
        latent_1LZ, columns_Q = self._dit().latent_mean_LZ[None], torch.from_numpy(columns.copy()).to(self.device)
        size_1, number_1 = latent_1LZ.new_tensor([sizes.mean()]), columns_Q.new_zeros(1)
        return float(self.decoded(latent_1LZ, columns_Q, size_1, number_1, 0, kind).nnz)

    def columns(self, genes: Sequence[str] | None) -> np.ndarray:
        """Where the asked genes stand among the model's. Raises: InputError for one that is unknown or asked twice."""
        if genes is None:
            return np.arange(self.genes.n_genes)
        index = self.genes.lookup(genes)
        if (index == 0).any():
            raise InputError(f"gene {genes[int(np.argmin(index))]!r} is not among the model's {self.genes.n_genes}")
        if len(set(genes)) < len(genes):
            raise InputError(f"gene {next(g for g in genes if list(genes).count(g) > 1)!r} stands twice in genes")
        return index - 1

    def var(self, columns: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(index=pd.Index([self.genes.ids[k] for k in columns]))

    def obs(self, wanted: Wanted, library_size_n: np.ndarray) -> pd.DataFrame:
        """Conditions as categories, of which one is "not given", continuous ones as numbers; and the library sizes."""
        obs = pd.DataFrame(index=pd.Index([f"generated-{k}" for k in range(wanted.n_cells)]))
        for name, ids in wanted.ids.items():
            if name in self._dit().config.continuous:
                obs[name] = ids[wanted.combination_n]
                continue
            labels = self.conditions.labels[name]
            known = list(dict.fromkeys([*labels, *([] if name in wanted.labels else [NOT_GIVEN])]))
            codes = ids if name in wanted.labels else np.full(len(ids), known.index(NOT_GIVEN))
            obs[name] = pd.Categorical.from_codes(codes[wanted.combination_n], categories=known)  # pyright: ignore[reportArgumentType]  # its stubs know lists alone
        obs["library_size"] = library_size_n
        return obs

    def _dit(self) -> DiT:
        if self.dit is None:
            raise InputError("this model folder holds an autoencoder alone: it embeds, but does not generate")
        return self.dit


def written(predicted: Predicted, kind: Kind, size_B: Tensor, keys_BQ: Tensor) -> sp.csr_matrix:
    """What is written of a batch, (B, Q): int32 counts, or float32 means.

    Raises: InputError for cells of which the decoder says what is not a number.
    """
    if broken := int(predicted.value_BQ.isnan().any(1).sum()):
        raise InputError(
            f"{broken} of {len(size_B)} cells of a batch have no expected counts (NaN): weights of the model are not "
            "finite, or the sampler's steps went beyond all bounds; try more of them (sampler.n_steps)"
        )
    made_BQ = predicted.expected(size_B).float() if kind == "means" else predicted.sample(size_B, keys_BQ)
    return sp.csr_matrix(made_BQ.cpu().numpy())
