"""Starting from trained weights on other data: genes and labels are joined by name, what is new gets new rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scldm.errors import InputError
from scldm.model.dit import DiT
from scldm.model.vae import VAE
from scldm.vocab import ConditionVocab, GeneVocab, unversioned, why_few

PER_GENE = tuple(
    f"{name}.weight" for name in ("gene_embedding", "log_share", "log_theta", "log_std", "log_odds_dropout")
)


@dataclass(frozen=True)
class Joined:
    """How the names of a table met those of the trained one.

    what: `genes`, or a condition
    known: in both: their rows are the trained ones
    new: in the new data alone: rows as a network starts with
    left_out: in the trained weights alone
    """

    what: str
    known: int
    new: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        told = f"{self.what}: {self.known:,} known"
        for kind, names in (("new", self.new), ("left out", self.left_out)):
            if names:
                more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
                told += f", {len(names):,} {kind} ({', '.join(names[:5])}{more})"
        return told

    def to_json(self) -> dict[str, Any]:
        return {"known": self.known, "new": list(self.new), "left_out": list(self.left_out)}


def vae_from(vae: VAE, genes: GeneVocab, trained: VAE, trained_genes: GeneVocab, min_gene_share: float) -> list[Joined]:
    """Put trained weights into an autoencoder of other genes.

    min_gene_share: of the genes of either, whichever are fewer, that both must have
    Raises: InputError where the networks are of different shape, or too few genes are in both.
    """
    if genes.namespace != trained_genes.namespace:
        raise InputError(
            f"init_from: its genes are {trained_genes.namespace} ids, those of data.shards {genes.namespace}"
        )
    joined, rows = _join("genes", unversioned(genes.ids), unversioned(trained_genes.ids))
    fewest = min(genes.n_genes, trained_genes.n_genes)
    if not joined.known or joined.known < min_gene_share * fewest:
        raise InputError(
            f"init_from: {joined.known:,} of {fewest:,} genes matched, and at least {100 * min_gene_share:.3g} % are "
            f"needed (min_gene_share={min_gene_share:g}). Those of data.shards are named like {genes.ids[0]!r}, its "
            f"own like {trained_genes.ids[0]!r}{why_few(genes.ids, trained_genes.ids)}"
        )
    if vae.config.direct != trained.config.direct:
        raise InputError(f"init_from: it was trained with model.direct={trained.config.direct}. Give model.direct that")
    per_gene = torch.cat((torch.zeros(1, dtype=torch.int64), torch.where(rows < 0, -1, rows + 1)))  # row 0 is padding
    start = dict(vae.state_dict()).get("log_share.weight", torch.zeros(0)).clone()
    _copy(vae, dict(trained.named_parameters()), dict.fromkeys(PER_GENE, per_gene), {})
    if len(start):
        _align_new(vae.log_share.weight, start, per_gene >= 0)
    return [joined]


@torch.no_grad()
def _align_new(log_share: Tensor, start: Tensor, known: Tensor) -> None:
    """Shares have a meaning beside one another: new genes' stand to the known ones' sum as they do at a start."""
    known = known.to(log_share.device)
    own = known.clone()
    own[0] = False  # padding
    log_share[~known] += log_share[own].logsumexp(0) - start[own].logsumexp(0)


def dit_from(dit: DiT, conditions: ConditionVocab, trained: DiT, trained_conditions: ConditionVocab) -> list[Joined]:
    """Put trained weights into a diffusion transformer of other labels or conditions.

    A condition that the trained one lacks starts as a network does, one that is no more is left out.

    Raises: InputError where the networks are of different shape, have tokens for combinations, or take conditions
        otherwise. Weights that were trained beside `condition_means` or library sizes, or on a log scale, mean
        something else without.
    """
    if dit.config.combination_tokens or trained.config.combination_tokens:
        raise InputError("init_from: model.combination_tokens are of the trained data's combinations. Set it to false")
    settings = {
        key: (getattr(trained.config, key), getattr(dit.config, key)) for key in ("condition_means", "library_size")
    }
    scales = trained.config.continuous, dit.config.continuous
    settings |= {f"continuous.{name}": (scales[0][name], scales[1][name]) for name in scales[0] if name in scales[1]}
    for key, (was, given) in settings.items():
        if was != given:
            raise InputError(
                f"init_from: it was trained with model.{key}={was}, not {given}. Give it model.{key}={was}"
            )
    report, tables, renamed = [], {}, {}
    before, now = list(trained.n_labels), list(dit.n_labels)
    for k, name in enumerate(now):
        prefix = f"condition.{k}."
        if name not in before:
            report.append(Joined(name, 0, conditions.labels[name], ()))
            renamed[prefix] = None
            continue
        joined, rows = _join(name, conditions.labels[name], trained_conditions.labels[name])
        report.append(joined)
        renamed[prefix] = f"condition.{before.index(name)}."
        null = torch.tensor([trained.n_labels[name]])
        tables[f"{prefix}weight"] = torch.cat((rows, null))
    report += [Joined(name, 0, (), trained_conditions.labels[name]) for name in before if name not in now]
    _copy(dit, dict(trained.named_parameters()), tables, renamed)
    if dit.config.library_size:  # on the scale that was trained
        dit.size.log_moments.copy_(trained.size.log_moments)
    return report


def _join(what: str, names: Sequence[str], trained: Sequence[str]) -> tuple[Joined, Tensor]:
    at = {name: k for k, name in enumerate(trained)}
    rows = torch.tensor([at.get(name, -1) for name in names], dtype=torch.int64)
    new = tuple(name for name in names if name not in at)
    left_out = tuple(sorted(at.keys() - set(names), key=at.__getitem__))
    return Joined(what, len(names) - len(new), new, left_out), rows


@torch.no_grad()
def _copy(
    network: nn.Module, trained: dict[str, Tensor], tables: dict[str, Tensor], renamed: dict[str, str | None]
) -> None:
    """Copy every parameter that the trained network has.

    tables: parameter -> the rows of the trained one that its rows are. One stays as it is where that is -1
    renamed: prefix -> that in the trained network. None where it has none
    """
    for name, parameter in network.named_parameters():
        source: str | None = name
        for prefix, other in renamed.items():
            if name.startswith(prefix):
                source = None if other is None else other + name.removeprefix(prefix)
        if source is None:
            continue
        found = trained.get(source)
        is_table = name in tables
        if found is None or found.shape[is_table:] != parameter.shape[is_table:]:
            raise InputError(
                f"init_from: its {name} is {'missing' if found is None else tuple(found.shape)}, that of model is "
                f"{tuple(parameter.shape)}. Give model the shape that was trained"
            )
        if is_table:
            known = (tables[name] >= 0).nonzero()[:, 0]
            parameter[known] = found[tables[name][known]].to(parameter)
        else:
            parameter.copy_(found)
