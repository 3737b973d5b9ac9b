"""How every figure looks, and how labels become text in one.

One meaning, one colour, everywhere: blue is real, vermillion is generated, green is the floor, purple are parts of the
model, grey are the baselines. The colours are Okabe and Ito's and Tol's "muted", which stay apart for colour-blind
readers. A shape or a word says it again.

Labels and gene names are text: `style` turns mathematical notation off, and `label` replaces what a font can't draw.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import matplotlib as mpl
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D

# --- colours -------------------------------------------------------------------------------------------------------

REAL, GENERATED, FLOOR, PART, BASELINE = "#0072B2", "#D55E00", "#009E73", "#AA3377", "#6E7781"
INK, FAINT, GRID = "#1F2328", "#C9CED6", "#E7EAEE"
LABEL_COLORS = ("#332288", "#DDCC77", "#117733", "#CC6677", "#88CCEE", "#882255", "#44AA99", "#AA4499", "#999933")
SHAPES = "o^"
OTHERS = ("#A3ABB5", "o")
SOURCES = {"real": ("real test cells", REAL), "generated": ("generated cells", GENERATED)}

# --- style ---------------------------------------------------------------------------------------------------------

WIDTH = 12.0  # inches. Every figure is as wide, so that type has one size on the page
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # `T $\foo$ cell` is a name
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": "#8A929C",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
}


@contextmanager
def style() -> Iterator[None]:
    """matplotlib with the report's look, whatever the user's own settings are, and as it was afterwards. A figure must
    be made and saved inside: tick labels are made when it is saved."""
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's text.usetex=True would send labels to LaTeX
        mpl.rcParams.update(STYLE)
        yield


# --- text ----------------------------------------------------------------------------------------------------------


@cache
def drawable() -> frozenset[int]:
    """Code points that the figures' font has, upright and bold."""
    fonts = (get_font(findfont(FontProperties(family="DejaVu Sans", weight=weight))) for weight in ("normal", "bold"))
    return frozenset.intersection(*(frozenset(font.get_charmap()) for font in fonts))


def label(text: str, limit: int = 34) -> str:
    """A label or gene as a figure can write it, at most `limit` characters. Both ends stay, since names that are long
    differ at either. What the font lacks stands as its code point, such as U+1F9EC."""
    out = []
    for c in " ".join(text.split()):
        if unicodedata.category(c) in ("Cc", "Cf", "Cs"):  # invisible: joiners, marks of direction
            continue
        out.append(c if ord(c) in drawable() else f"U+{ord(c):X}")
    shown = "".join(out)
    if len(shown) > limit:
        tail = (limit - 1) // 2
        shown = f"{shown[: limit - 1 - tail].rstrip()}…{shown[len(shown) - tail :].lstrip()}"
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves "_..." out of a legend


def labels(texts: Sequence[str], limit: int = 34) -> list[str]:
    """`label` of each, with a number after those that would read alike."""
    seen: dict[str, int] = {}
    out = []
    for shown in (label(text, limit) for text in texts):
        seen[shown] = seen.get(shown, 0) + 1
        out.append(shown if seen[shown] == 1 else f"{shown} ({seen[shown]})")
    return out


def number(value: float, digits: int) -> str:
    """A number with so many decimals, a true minus sign, and no minus before zero."""
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


# --- looks of labels -----------------------------------------------------------------------------------------------

Look = tuple[str, str]  # colour, marker shape
N_LOOKS = len(LABEL_COLORS) * len(SHAPES)


def looks_of(names: Sequence[str], start: int = 0) -> dict[str, Look]:
    """label -> its look, of the first 18 whom nine colours and two shapes tell apart. The others share a grey."""
    n = len(LABEL_COLORS)
    own = [(LABEL_COLORS[k % n], SHAPES[k // n]) for k in range(start, N_LOOKS)]
    return {t: own[k] if k < len(own) else OTHERS for k, t in enumerate(names)}


def label_sizes(evaluation: dict) -> dict[str, dict[str, int]]:
    """condition -> label -> compared cells."""
    sizes: dict[str, dict[str, int]] = {condition: {} for condition in evaluation["conditions"]}
    for of in evaluation["cells"].get("by_combination", {}).values():
        for condition, x in zip(sizes, of["labels"], strict=True):
            sizes[condition][x] = sizes[condition].get(x, 0) + of["compared"]
    return sizes


def condition_looks(evaluation: dict) -> dict[str, dict[str, Look]]:
    """condition -> label -> look, most compared cells first. No look stands twice where the labels of all conditions
    are few enough. Else each condition has all looks."""
    order = {condition: sorted(n, key=lambda x: -n[x]) for condition, n in label_sizes(evaluation).items()}
    share = sum(map(len, order.values())) <= N_LOOKS
    out, start = {}, 0
    for condition, names in order.items():
        out[condition] = looks_of(names, start if share else 0)
        start += len(names)
    return out


def grey_labels(looks: Mapping[str, Look]) -> list[str]:
    """Those without a look of their own."""
    return [t for t, look in looks.items() if look == OTHERS]


def look_handles(looks: Mapping[str, Look], limit: int = 34) -> list[Line2D]:
    """One legend handle for each label that has a look of its own, and one for the rest."""
    own = [t for t, look in looks.items() if look != OTHERS]
    rest = len(looks) - len(own)
    entries = [(text, looks[t]) for t, text in zip(own, labels(own, limit), strict=True)]
    entries += [(f"{rest} others", OTHERS)] * (rest > 0)
    return [handle(text, color, shape) for text, (color, shape) in entries]


def handle(text: str, color: str, shape: str = "o", **more: Any) -> Line2D:
    return Line2D([], [], marker=shape, linestyle="", color=color, label=text, **more)
