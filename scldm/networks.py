"""Both trained networks, and what they know of genes, conditions and library sizes: cells in batches.

Reading order: batch_on, precision_on, usable, Networks, written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm import draws
from scldm.arguments import names_of, seed_of
from scldm.errors import InputError
from scldm.flow.generate import generate_latents
from scldm.flow.sampler import SamplerConfig
from scldm.library_size import LibrarySizeModel
from scldm.model.attention import Choice
from scldm.model.dit import DiT
from scldm.model.predicted import Predicted
from scldm.model.vae import VAE, VAEConfig, chosen
from scldm.request import labels as asked
from scldm.request.told_sizes import ToldSizes
from scldm.request.wanted import Wanted, distinct
from scldm.version import VERSION
from scldm.vocab import MIN_GENE_SHARE, ConditionVocab, GeneVocab

MAX_LIBRARY_SIZE = 1e8  # a thousand times a large cell's. Above, a gene's count may not fit its 32 bits
NOT_GIVEN = "not given"
Kind = Literal["counts", "means"]
Precision = Literal["float32", "bfloat16"]
AskedPrecision = Literal["auto", "float32", "bfloat16"]
# a batch decodes its cells for all genes: 64 cells x 60,000 genes x width 512 x 4 B = 8 GB
BATCH_CELLS = 64  # on a CPU
PREVIEW_BYTES = 2e9  # that a preview's batch may take beside what trains, but for a single cell that takes more
# on a GPU a batch takes up to a quarter of its memory, beside tiles and weights: 256 cells of 36,130 genes in 80 GB
BATCH_SHARE, MOST_CELLS = 1 / 4, 1_024


def batch_on(device: str | torch.device, vae: VAE) -> int:
    """Cells of a batch that is to decode all genes, a power of two: GPUs of one kind take the same."""
    if torch.device(device).type != "cuda":
        return BATCH_CELLS
    fits = BATCH_SHARE * torch.cuda.get_device_properties(device).total_memory / cell_bytes(vae.config, vae.n_genes)
    return min(MOST_CELLS, 1 << max(0, math.floor(math.log2(max(fits, 1)))))


def precision_on(device: str | torch.device, asked: AskedPrecision) -> Precision:
    """`auto` is bfloat16 on a GPU whose matrix units take it, NVIDIA's from compute capability 8.0 on, else float32."""
    if asked != "auto":
        return asked
    has_it = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if has_it else "float32"


def cell_bytes(config: VAEConfig, n_genes: int) -> int:
    """Bytes of a cell while all its genes are decoded. For each gene, a pair of a head and a latent token has five
    numbers: weights, and what goes into a norm's variance. Counts and their draws have at most 192 more, as a GPU takes
    up to 675 bytes for a count that may be positive."""
    return 4 * n_genes * (5 * config.decoder_cross_heads * config.n_latents + 192)


def preview_cells(config: VAEConfig, n_genes: int) -> int:
    """How many cells a preview of a training decodes at once, on the device of the training."""
    return min(BATCH_CELLS, max(1, int(PREVIEW_BYTES / cell_bytes(config, n_genes))))


def usable(device: str | torch.device) -> None:
    """Raises: InputError for a device that torch does not know, or that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: a torch without CUDA
        why = str(error).splitlines()[0]
        unknown = why.startswith(("Expected one of", "Invalid device")) or isinstance(error, TypeError)
        raise InputError(f"device={device}: {'torch knows cpu, cuda, cuda:1 and others' if unknown else why}") from None


def device_of(device: str) -> str:
    """The device that is named. Where none is, a GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


class Made(NamedTuple):
    """matrix: (n, genes) int32 counts or float32 means. n_evaluations_n: of the network for each cell, int32"""

    matrix: sp.csr_matrix
    n_evaluations_n: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)  # a model is itself: as it is, it can be a key
class Networks:
    """Autoencoder, diffusion transformer and what they need to know of genes, conditions and library sizes. batch,
    precision and min_gene_share are as for `load`.

    origin: where the weights come from
    hash: of the weights
    gene_columns: what else is known of the genes, such as symbols: text columns, by gene id in the genes' order
    history: stage, `vae` or `ldm` -> what was measured in training: a row a step and split
    """

    vae: VAE
    dit: DiT | None
    genes: GeneVocab
    conditions: ConditionVocab
    library_sizes: LibrarySizeModel
    origin: dict[str, Any]
    hash: str
    batch: int = BATCH_CELLS
    precision: Precision = "float32"
    gene_columns: pd.DataFrame = field(default_factory=pd.DataFrame)
    history: dict[str, pd.DataFrame] = field(default_factory=dict)
    min_gene_share: float = MIN_GENE_SHARE

    @property
    def made_by(self) -> dict[str, str | int]:
        """What of the model decides its numbers."""
        return {"model": self.hash, "batch": self.batch, "precision": self.precision, "attention": self.attention.way}

    def record(
        self, verb: str, *, seed: int | None = None, sampler: SamplerConfig | None = None, **more: str | int
    ) -> dict[str, str | int]:
        """What `uns["scldm"]` says of cells that this model made, moved or embedded: texts and numbers, which every
        format keeps.

        sampler: as JSON
        """
        told: dict[str, str | int] = {"version": VERSION, "verb": verb, **self.made_by}
        told |= {} if seed is None else {"seed": seed}
        told |= {} if sampler is None else {"sampler": json.dumps(asdict(sampler))}
        return {**told, **more}

    @property
    def missing(self) -> dict[str, str]:
        """Condition -> the label that training gave its missing values, where it has that label."""
        label = self.origin.get("missing", "")
        return {name: label for name, labels in self.conditions.labels.items() if label in labels}

    @property
    def device(self) -> torch.device:
        return self.vae.latent_queries.device

    @property
    def attention(self) -> Choice:
        """How the autoencoder's attention is computed here, and why."""
        return self.attention_on(self.device)

    def attention_on(self, device: str | torch.device) -> Choice:
        return chosen(self.vae.config, torch.device(device), getattr(torch, self.precision))

    def to(self, device: str | torch.device) -> Self:
        """The same model on another device. Its networks are moved, not copied."""
        return replace(self, vae=self.vae.to(device), dit=self.dit and self.dit.to(device))

    def computing(self) -> torch.autocast:
        """Within, the networks compute in `precision`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _here(self, numbers: np.ndarray) -> Tensor:
        """Numbers of our own on the model's device. The host does not wait for what the device does before."""
        return torch.from_numpy(numbers).to(self.device, non_blocking=True)

    # --- which cells ---

    def check_conditions(self, conditions: pd.DataFrame, seed: int, sampler: SamplerConfig | None = None) -> Wanted:
        """The cells to make, or the error that generation would meet. Arguments are as for `generate`."""
        dit = self._dit()
        seed = seed_of(seed)
        if len(conditions) == 0:
            raise InputError("there are no cells to generate: the table of conditions is empty")
        combination_n, labels = distinct(conditions.drop(columns="library_size", errors="ignore"), self.missing)
        ids, labels = asked.encode_labels(dit, self.conditions, labels)
        sampler = sampler or SamplerConfig()
        base, ways = asked.base_of(dit, ids, sampler)
        asked.check_sampler(dit, base, sampler, self.origin)
        notes = asked.without_token(dit, base, labels)
        notes += asked.of_other_labels(dit, self.conditions, base, ids, labels, asked.DRAWN)
        told = None
        if dit.config.library_size:
            told = ToldSizes.of(self.library_sizes, labels, asked.labels_of_base(dit, self.conditions, base, labels))
        if "library_size" in conditions:
            size_n = _given_sizes(conditions["library_size"].array)
            if told is not None:
                notes += told.note(torch.from_numpy(size_n), torch.from_numpy(combination_n), labels)
            return Wanted(seed, combination_n, labels, ids, base, ways, size_n, told_sizes=told, notes=notes)
        log_mean, log_std, backed_off = self.library_sizes.of(labels)
        notes = (*notes, *backed_off)
        return Wanted(seed, combination_n, labels, ids, base, ways, None, log_mean, log_std, told, notes)

    # --- cells ---

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

        Batches begin at multiples of `batch` and are filled up, because a float sum depends on the shape of its batch.
        So a cell's numbers are the same bit for bit whatever rows are asked for with it, by whichever rank. This holds
        for as many threads of torch, which share a sum's terms, and on the same kind of device. It holds whatever
        genes are asked for: the decoder scores every gene, and counts are drawn of the asked ones alone.

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
            size_n = wanted.library_size(batch)
            size_B, told_B = (self._here(n.astype(np.float32)) for n in (size_n, wanted.told_size(batch, size_n)))
            with self.computing():
                base = of_base, self._here(wanted.way_of(batch))
                drawn = generate_latents(self._dit(), of_batch, numbers_B, wanted.seed, sampler, base, told_B)
            own = slice(max(rows.start - first, 0), rows.stop - first)
            parts.append(self.decoded(drawn.latent_BLZ, columns_Q, size_B, numbers_B, wanted.seed, kind)[own])
            n_evaluations.append(drawn.n_evaluations_B[own])
            tick(parts[-1].shape[0])
        return Made(sp.csr_matrix(sp.vstack(parts)), torch.cat(n_evaluations).int().cpu().numpy())

    @torch.no_grad()
    def decoded(
        self, latent_BLZ: Tensor, columns_Q: Tensor, library_size_B: Tensor, numbers_B: Tensor, seed: int, kind: Kind
    ) -> sp.csr_matrix:
        """Generated latents as what is written of them, (B, Q)."""
        all_genes_G = torch.arange(1, self.genes.n_genes + 1, device=self.device)
        with self.computing():
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

    # --- their genes and labels ---

    def columns(self, genes: Sequence[str] | None) -> np.ndarray:
        """Where the asked genes stand among the model's. Raises: InputError for one that is unknown or asked twice."""
        if genes is None:
            return np.arange(self.genes.n_genes)
        genes = names_of("genes", genes, "gene ids", '["CD3E", "MS4A1"]')
        if not genes:
            raise InputError("genes=[] names no gene. Leave it out for all of the model's")
        return self.genes.places(genes)

    def var(self, columns: np.ndarray) -> pd.DataFrame:
        """The genes by id, with what else is known of them."""
        ids = pd.Index([self.genes.ids[k] for k in columns])
        return self.gene_columns.loc[ids].copy() if len(self.gene_columns) else pd.DataFrame(index=ids)

    def obs(self, wanted: Wanted, sampler: SamplerConfig, library_size_n: np.ndarray) -> pd.DataFrame:
        """Conditions as categories, of which one is "not given", continuous ones as numbers, and the library sizes.

        A cell's name is `generated-CALL-NUMBER`. CALL is a hash of the model, the conditions, the sampler and the seed:
        the same call gives the same names, and other calls give others.
        """
        call = hashlib.sha256(f"{self.hash} {wanted.hash} {json.dumps(asdict(sampler))} {wanted.seed}".encode())
        names = [f"generated-{call.hexdigest()[:8]}-{k}" for k in range(wanted.n_cells)]
        obs = pd.DataFrame(index=pd.Index(names))
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


def _given_sizes(column: Any) -> np.ndarray:
    """Library sizes of a table, float64 (n,). Raises: InputError for one that none can be."""
    size_n = np.array(pd.to_numeric(pd.Series(column).astype(object), errors="coerce"), dtype=np.float64)
    if not (ok := (size_n > 0) & (size_n <= MAX_LIBRARY_SIZE)).all():
        at = int(np.argmin(ok))
        raise InputError(
            f"column library_size, row {at}: {column[at]} must be a number above 0 and at most {MAX_LIBRARY_SIZE:,.0f}"
        )
    return size_n


def written(predicted: Predicted, kind: Kind, size_B: Tensor, keys_BQ: Tensor) -> sp.csr_matrix:
    """What is written of a batch, (B, Q): int32 counts, or float32 means.

    Raises: InputError for cells of which the decoder says what is not a number.
    """
    if broken := int(predicted.value_BQ.isnan().any(1).sum()):
        raise InputError(
            f"{broken} of {len(size_B)} cells of a batch have no expected counts (NaN): weights of the model are not "
            "finite, or the sampler's steps went beyond all bounds. Try more of them (sampler.n_steps)"
        )
    made_BQ = predicted.expected(size_B).float() if kind == "means" else predicted.sample(size_B, keys_BQ)
    return sp.csr_matrix(made_BQ.cpu().numpy())
