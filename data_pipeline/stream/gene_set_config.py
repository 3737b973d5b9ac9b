"""Which genes of a cell are taken, as a user says it. It imports no package, so that what is wrong is said at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from scldm.checked import Checked, checked
from scldm.errors import InputError

Policy = Literal["all", "random", "expressed", "expressed_plus_zeros", "weighted", "same"]
DRAWN: tuple[Policy, ...] = ("random", "weighted")
OF_THE_CELL: tuple[Policy, ...] = ("expressed", "expressed_plus_zeros")
READS: dict[Policy, tuple[str, ...]] = {  # the settings that have an effect
    "all": (),
    "random": ("n_genes", "share", "gene_set_group"),
    "expressed": ("n_genes", "overflow"),
    "expressed_plus_zeros": ("n_genes", "overflow"),
    "weighted": ("n_genes", "share", "gene_set_group", "weight_by"),
    "same": (),
}


@dataclass(frozen=True)
class GeneSetConfig(Checked):
    """Which genes of a cell are taken.

    policy: all, random, expressed, expressed_plus_zeros or weighted. For the decoder also same (the encoder's set)
    n_genes: genes in a set (random, weighted, expressed_plus_zeros), or the padded width (expressed). With expressed,
        0 pads to the longest cell of each micro-batch
    gene_set_group: positions of the global batch that share a drawn set. 1 draws one per cell. A shared set is faster.
        One per cell learns more in a step and ends better: 7 nats of 635 on pbmc3k (benchmarks/speedrun.md). So it
        belongs to the run and not to the hardware. micro_batch must divide it
    weight_by: weighted draws by `mean`, the mean count, or by `variability`, the variance f (1 - f) of being expressed
    overflow: for cells with more expressed genes than n_genes: refuse, or sample (n_genes of them, uniformly)
    share: random, weighted: where n_genes is 0, so large a part of the vocabulary's genes, rounded up. 1 takes all
        genes, whatever n_genes says, so that one key undoes any preset
    """

    policy: Policy = "all"
    n_genes: int = checked(0, at_least=0)
    gene_set_group: int = checked(1, at_least=1)
    weight_by: Literal["mean", "variability"] = "mean"
    overflow: Literal["refuse", "sample"] = "refuse"
    share: float = checked(0.0, at_least=0, at_most=1)

    def check(self, key: str) -> None:
        """key: where this stands in a run's config.

        Raises: InputError for a setting that the policy does not read: it was given in vain, or the policy forgotten.
        """
        reads = READS[self.policy] if self.n_genes or self.policy != "expressed" else ("n_genes",)
        for name in (field.name for field in fields(self) if field.name not in ("policy", *reads)):
            value, default = getattr(self, name), getattr(GeneSetConfig, name)
            if value != default:
                readers = ", ".join(policy for policy, names in READS.items() if name in names)
                without = " without n_genes" if name in READS[self.policy] else ""
                raise InputError(
                    f"{key}.{name}={value} has no effect with {key}.policy={self.policy}{without}. It is read by "
                    f"{readers}. Else leave it at {default}"
                )

    def of(self, n_genes: int) -> GeneSetConfig:
        """With the number of genes instead of a share, in a vocabulary of so many. To draw all at random is policy
        all."""
        by_share = self.share == 1 or (self.share and not self.n_genes)
        sized = replace(self, n_genes=math.ceil(self.share * n_genes)) if by_share else self
        return GeneSetConfig() if sized.policy == "random" and sized.n_genes == n_genes else sized

    def is_per_cell(self, n_genes: int) -> bool:
        """Whether each cell has a set of its own, in a vocabulary of so many."""
        of = self.of(n_genes)
        return of.policy in OF_THE_CELL or (of.policy in DRAWN and of.gene_set_group == 1)


def as_whole_cells(given: GeneSetConfig) -> GeneSetConfig:
    """How whole cells are given to an encoder that is trained on such sets, to be judged, encoded or standardised. It
    gets all genes where a drawn set was a part of them. Else as in training, as all genes would be another function."""
    if given.policy == "expressed":
        return GeneSetConfig("expressed")
    return given if given.policy in OF_THE_CELL else GeneSetConfig()
