"""What the words of an evaluation may name, known before packages are imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scldm.errors import InputError


def check_controls(given: Mapping[str, str], conditions: Iterable[str]) -> None:
    """given: condition -> its reference label. Raises: InputError for a condition that is not judged."""
    for condition, label in given.items():
        if condition not in conditions:
            raise InputError(f"control.{condition}={label}: the conditions are {', '.join(conditions) or 'none'}")


PROTOCOL_NOTE = "protocol not fully known"
# data -> method -> (RE, PCC, MSE). Source: Palla et al., arXiv 2511.02986: workshop version, and version 2 of the paper
PUBLISHED: dict[str, dict[str, tuple[float, float, float]]] = {
    "dentate_gyrus": {
        "scVI": (5193, 0.058, 0.378),
        "CFGen": (5469, 0.076, 0.253),
        "scLDM workshop": (5233, 0.103, 0.249),
        "scLDM v2": (4572, 0.273, 0.206),
    },
    "tabula_muris": {
        "scVI": (5588, 0.221, 0.132),
        "CFGen": (5548, 0.136, 0.127),
        "scLDM workshop": (4570, 0.391, 0.092),
        "scLDM v2": (4994, 0.376, 0.106),
    },
    "hlca": {
        "scVI": (5659, 0.125, 0.238),
        "CFGen": (5429, 0.146, 0.117),
        "scLDM workshop": (4102, 0.421, 0.069),
        "scLDM v2": (4899, 0.310, 0.095),
    },
}


def check_published(data: str) -> None:
    """Raises: InputError for data without published numbers."""
    if data and data not in PUBLISHED:
        raise InputError(f"published={data!r} must be one of {', '.join(PUBLISHED)}")
