"""What an evaluation says in one sentence, and what to do next.

The order is that of harm. Cells that were copied are worth nothing however well they score. A lost effect may hide
behind good distances. Which stage to train further can be told where the model's parts were judged too.
"""

from __future__ import annotations

import numpy as np

from scldm.evaluate.baselines import SHIFTED
from scldm.evaluate.intervals import WIDTH as REACH
from scldm.evaluate.metrics import METRICS, Metric

COPIES = 0.6  # share of cells that are closer to training than to held-out cells above which cells count as repeated
WEAK = 0.7  # slope of a response below which an effect counts as washed out, where its interval lies below 1
DISTANCES = ("mmd2", "w2", "fd")

# --- counts for the headline ---------------------------------------------------------------------------------------


def headline_tables(evaluation: dict) -> list[dict]:
    """The tables that are counted: those of the combinations that were trained and scored one by one, else the pooled
    one. Of unseen combinations there are no real training cells to reach."""
    tables = [t for name, t in evaluation.get("by_combination", {}).items() if name not in evaluation["set_apart"]]
    return tables or [evaluation["pooled"]]


def summary(evaluation: dict) -> dict:
    """baselines: key -> on how many scores (metric by combination) generated cells are closer to the test cells. Only
    scores count on which the baseline is told apart from the floor. `like_real`: how many of all scores reach the
    floor within their 95 % interval."""
    tables = headline_tables(evaluation)
    keys = list(dict.fromkeys(key for t in tables for key in t["w2"]["baselines"]))
    beats = {key: [row["beats"].get(key) for t in tables for row in t.values()] for key in keys}
    apart = [t for t in evaluation["set_apart"] if t in evaluation.get("by_combination", {})]
    if apart:  # what else can be drawn of them is of other combinations
        rows = [row for t in apart for row in evaluation["by_combination"][t].values()]
        beats[SHIFTED[0]] = [row["beats"].get(SHIFTED[0]) for row in rows]
    judged = {key: [b for b in of if b is not None] for key, of in beats.items()}
    rows = [(METRICS[name], row) for t in tables for name, row in t.items()]
    like = [reaches_floor(metric, row) for metric, row in rows if row["error"] is not None]
    return {
        "baselines": {key: {"closer": sum(of), "judged": len(of)} for key, of in judged.items() if of},
        "like_real": {"reached": sum(like), "judged": len(like)},
    }


def reaches_floor(metric: Metric, row: dict) -> bool:
    """Whether some value of a score's 95 % interval is at least as good as the floor's mean. Of a score that depends on
    the number of cells, whether the floor's mean lies within the interval, which counts the floor's own spread."""
    score, floor = row["score"], row["floor"]
    if metric.of_size:
        return bool(abs(score - floor["mean"]) <= REACH * np.hypot(row["error"], floor["sd"]))
    low, high = score - REACH * row["error"], score + REACH * row["error"]
    ideal = {"half": 0.5, "one": 1.0}.get(metric.best)
    ends = [low, high] if ideal is None else [low, high, float(np.clip(ideal, low, high))]
    return min(metric.loss(value) for value in ends) <= metric.loss(floor["mean"])


# --- the sentence --------------------------------------------------------------------------------------------------


def verdict(evaluation: dict) -> dict[str, str]:
    """says: a sentence, one on unseen combinations, where there are some, and one on what was scored. next: what to do.
    From the evaluation with its summary."""
    found = _of_trained(evaluation)
    return {**found, "says": " ".join([found["says"], *_of_unseen(evaluation), _of_what(evaluation)])}


def _of_what(evaluation: dict) -> str:
    """How many cells and combinations the scores are of."""
    cells = evaluation["cells"]
    told = f"The scores are of {cells['compared']:,} generated cells and as many test cells"
    if not evaluation["conditions"]:
        return f"{told}."
    of = " and ".join(evaluation["conditions"])
    scored, there = len(evaluation.get("by_combination", {})), len(cells["by_combination"])
    if not scored:
        return f"{told}. None of {there:,} combinations of {of} is scored by itself."
    return f"{told}. {scored:,} of {there:,} combinations of {of} are scored one by one."


def _of_unseen(evaluation: dict) -> list[str]:
    unseen = evaluation["set_apart"]
    if not unseen:
        return []
    told = []
    if n := evaluation["summary"]["baselines"].get(SHIFTED[0]):
        told.append(f"{n['closer']} of {n['judged']} scores are closer to real cells than ({SHIFTED[0]}) {SHIFTED[1]}")
    slopes = {c: r["unseen"]["slope"]["value"] for c, r in evaluation["response"].items() if r["unseen"]}
    told += [f"the response to {c} is {s:.2f} times the real" for c, s in slopes.items() if s is not None]
    what = f"{len(unseen)} unseen combination{'s' * (len(unseen) > 1)}"
    return [f"On {what}, {' and '.join(told)}."] if told else [f"{what} can't be judged."]


def _of_trained(evaluation: dict) -> dict[str, str]:
    if told := repeats_training_cells(evaluation["memorisation"]):
        return {
            "says": f"Generated cells repeat training cells: {told}. The other scores say nothing.",
            "next": "Train on more cells, or stop earlier (train.patience), or take a smaller model.",
        }
    slopes = {c: s for c, r in evaluation["response"].items() if (s := _slope(r)) is not None}
    lost = {c: s for c, s in slopes.items() if s["value"] < WEAK and s["high"] < 1}
    if lost:
        condition, s = min(lost.items(), key=lambda item: item[1]["value"])
        return {
            "says": f"The effect of {condition} is washed out: generated changes are {s['value']:.2f} times the real.",
            "next": (
                f"Check that the model has the condition {condition}, train stage 2 longer, or raise "
                "sampler.guidance_scale."
            ),
        }
    counts = evaluation["summary"]
    reached, judged = counts["like_real"]["reached"], counts["like_real"]["judged"]
    apart = {SHIFTED[0]} if evaluation["set_apart"] else set()
    closer = {k: (v["closer"], v["judged"]) for k, v in counts["baselines"].items() if k not in apart}
    told = f"{reached} of {judged} scores reach real training cells within their intervals"
    if not closer:
        return {
            "says": f"There are too few cells to tell even the baselines from real cells. {told}.",
            "next": "Give more test cells, and generate as many.",
        }
    key, (n, m) = min(closer.items(), key=lambda item: item[1][0] / item[1][1])
    if n < 0.5 * m:
        says = f"The model loses to a baseline: only {n} of {m} scores are closer to real cells than ({key})"
    elif reached >= 0.9 * judged and n >= 0.9 * m:
        says = "Generated cells can hardly be told from real ones"
        return {
            "says": f"{says}. {told}.",
            "next": "Look at the smallest groups and at the responses before using them.",
        }
    else:
        says = "The model beats the baselines on most scores"
    return {"says": f"{says}. {told}.", "next": what_limits(evaluation)}


def repeats_training_cells(memorisation: dict) -> str:
    """Why they are thought to, or nothing."""
    exact = {name: memorisation.get(name, {"score": 0.0})["score"] for name in ("exact_copies", "exact_copies_real")}
    if exact["exact_copies"] > max(0.01, 2 * exact["exact_copies_real"]):
        return f"{exact['exact_copies']:.0%} have the counts of one in every gene"
    closer = memorisation.get("closer_to_training")
    if closer and closer["score"] > COPIES and closer["score"] - REACH * (closer["error"] or 0) > 0.5:
        return f"{closer['score']:.0%} are closer to a training cell than to a held-out one, where half would be"
    return ""


def _slope(response: dict) -> dict[str, float] | None:
    slope = response["pooled"].get("slope", {})
    return slope if slope.get("value") is not None and "high" in slope else None


# --- which part limits ---------------------------------------------------------------------------------------------


RISES = "If that loss rises, more training cells are needed."


def what_limits(evaluation: dict) -> str:
    """From cells that were encoded and decoded again: how much of what generated cells lack do they lack too?

    It is the median of (part - floor) / (generated - floor) over MMD2, W2 and FD, at equal numbers of cells. A distance
    counts where generated cells differ from training cells by more than draws of training cells do. Encoded training
    cells are taken if there are any. Encoded test cells lie too near to the test cells, which they are made of."""
    part = evaluation["parts"].get("from_training") or evaluation["parts"].get("reconstructed")
    if part is None:
        return "`scldm evaluate` with model=FOLDER tells whether the autoencoder or the diffusion model limits."
    section = "per_combination" if "per_combination" in part else "pooled"
    generated, floor, spread = (evaluation["beside_parts"][k][section] for k in ("generated", "floor", "floor_sd"))
    told = [
        m
        for m in DISTANCES
        if METRICS[m].beyond(generated[m], floor[m]) > REACH * spread[m] and generated[m] != floor[m]
    ]
    if not told:
        return "No distance tells generated cells from training cells: look at the gene-level scores."
    share = float(np.median([(part[section][m] - floor[m]) / (generated[m] - floor[m]) for m in told]))
    if share >= 0.5:
        return (
            f"Reconstruction limits: encoding and decoding alone explains {min(share, 1):.0%} of the distance to real "
            "cells. While the validation loss still falls, train the autoencoder longer, give it more genes, or take a "
            f"larger one. {RISES}"
        )
    return (
        f"The diffusion model limits: encoding and decoding alone explains {max(share, 0):.0%} of the distance to real "
        f"cells. While its validation loss still falls, train stage 2 longer, or take a larger one. {RISES}"
    )
