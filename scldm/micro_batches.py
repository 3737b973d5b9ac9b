"""How a global batch is cut: ranks x micro-batches of each x cells of a micro-batch. One rule for stream and engine."""

from __future__ import annotations

from scldm.errors import InputError


def accumulation(global_batch: int, n_ranks: int, micro_batch: int) -> int:
    """Micro-batches per rank and optimizer step.

    Raises: InputError where ranks x micro_batch does not divide the global batch, with the nearest values that would.
    """
    share = n_ranks * micro_batch
    if global_batch % share == 0:
        return global_batch // share
    worlds = [n for n in range(1, global_batch + 1) if global_batch % (n * micro_batch) == 0]
    micros = [m for m in range(1, global_batch + 1) if global_batch % (n_ranks * m) == 0]
    whole = global_batch // share * share
    allowed = {
        "world size": _near(n_ranks, worlds),
        "hardware.micro_batch": _near(micro_batch, micros),
        "train.global_batch": _near(global_batch, [whole, whole + share]),
    }
    nearest = "; ".join(f"{name} {values}" for name, values in allowed.items() if values)
    raise InputError(
        f"train.global_batch={global_batch} can't be split over {n_ranks} ranks with "
        f"hardware.micro_batch={micro_batch}. Nearest allowed: {nearest}"
    )


def _near(value: int, allowed: list[int]) -> str:
    """The nearest allowed values below and above."""
    below = [a for a in allowed if 0 < a < value]
    above = [a for a in allowed if a > value]
    return " or ".join(map(str, below[-1:] + above[:1]))
