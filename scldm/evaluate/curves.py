"""Loss curves out of the rows of a run's metrics.jsonl.

A row is {"step": int, "cells_seen": int, "time": s, "split": "train" | "validation", <metric>: float ...}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

MAX_POINTS = 1_000  # more than a figure has pixels for
NOT_METRICS = ("step", "cells_seen", "time", "split")

Curves = dict[str, dict[str, list[list[float]]]]


def curves_of(rows: Iterable[Mapping[str, Any]]) -> Curves:
    """split -> metric -> [[cells seen, value], ...] in the order of steps, at most 1,000 points evenly taken.

    Where a step stands twice (a resumed run repeats what was not saved), the last row wins. Values that are not finite
    numbers are passed over."""
    at = {(row["split"], row["step"]): row for row in rows if "cells_seen" in row}  # scores of a whole run have none
    out: Curves = {}
    for (split, _), row in sorted(at.items(), key=lambda item: item[0]):
        for name, value in row.items():
            if name not in NOT_METRICS and isinstance(value, int | float) and math.isfinite(value):
                out.setdefault(split, {}).setdefault(name, []).append([row["cells_seen"], value])
    for metrics in out.values():
        for name, points in metrics.items():
            every = math.ceil(len(points) / MAX_POINTS)
            metrics[name] = points[::-1][::every][::-1]  # from the end, so that the last value is always there
    return out
