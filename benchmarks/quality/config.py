"""What the benchmark is run on and with."""

from __future__ import annotations

from dataclasses import dataclass

from scldm.errors import InputError


@dataclass(frozen=True)
class QualityConfig:
    """Cells, methods and what each of them may use.

    h5ad: file with raw counts
    conditions: obs columns that cells are generated for
    out: folder of everything that it makes; each finished row is kept
    layer: layer that holds the counts; empty is X
    split: obs column that says train, validation or test; empty draws 60, 20 and 20 % of every combination
    split_seed: of that draw
    held_out: combinations that training does not see, such as `cell_type=CD14+ Monocytes,treatment=stim`; several are
        separated by semicolons, and a condition that is not named stands for all of its labels
    control: CONDITION=LABEL of untreated cells, such as `treatment=ctrl`; the methods that shift cells need it
    n_top_genes: most variable genes of the training cells that are kept; 0 keeps all
    methods: rows of the table; none takes all that the cells allow
    seconds: CPU-seconds that each method may train
    seeds: of training and draws; the table has means over them
    vae: more words for `scldm train vae`
    ldm: more words for `scldm train ldm`
    generate: more words for `scldm generate`
    min_cells: combinations with at least so many test cells are scored one by one
    max_cells: of a side, where every cell is compared with every other
    judge: score finished rows again
    keep: JSON of an earlier run on the same cells, judged alike, from which methods are taken that this one does not
        make; the JSON that is written says which, and of which commit
    json: print JSON, not the table
    save: write the JSON to this file as well, and the figure beside it
    """

    h5ad: str
    conditions: tuple[str, ...]
    out: str
    layer: str = ""
    split: str = ""
    split_seed: int = 0
    held_out: str = ""
    control: str = ""
    n_top_genes: int = 2_000
    methods: tuple[str, ...] = ()
    seconds: float = 600.0
    seeds: tuple[int, ...] = (0, 1)
    vae: tuple[str, ...] = ()
    ldm: tuple[str, ...] = ()
    generate: tuple[str, ...] = ()
    min_cells: int = 20
    max_cells: int = 2_000
    judge: bool = False
    keep: str = ""
    json: bool = False
    save: str = ""

    def __post_init__(self) -> None:
        if not self.conditions:
            raise InputError("conditions must name at least one obs column")
        if not self.seconds > 0:
            raise InputError(f"seconds={self.seconds} must be above 0")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds={','.join(map(str, self.seeds))} must be different numbers, at least one")
        if self.min_cells < 3:
            raise InputError(f"min_cells={self.min_cells} must be at least 3")
        if self.control:
            self.control_label()

    def control_label(self) -> tuple[str, str]:
        """Condition and label of untreated cells. Raises: InputError for a condition that is not one."""
        name, equals, label = self.control.partition("=")
        if not equals or name not in self.conditions:
            raise InputError(f"control={self.control} must be CONDITION=LABEL, of {', '.join(self.conditions)}")
        return name, label
