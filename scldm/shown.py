"""How a model shows itself: a few lines in a terminal, a small table in a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scldm.networks import Networks

MOST_LABELS = 4  # that are named of a condition


def rows_of(model: Networks) -> list[tuple[str, str]]:
    """What a reader wants to know first: (name, text)."""
    ids, kind = model.genes.ids, model.genes.namespace
    rows = [("genes", f"{len(ids):,} ({kind}: {', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})")]
    trained = model.dit.n_labels if model.dit else model.conditions.names
    for name in trained:
        labels = model.conditions.labels[name]
        more = f" and {len(labels) - MOST_LABELS:,} more" if len(labels) > MOST_LABELS else ""
        rows.append((name, f"{len(labels):,} labels: {', '.join(labels[:MOST_LABELS])}{more}"))
    vae = model.vae.config
    rows.append(("autoencoder", f"{_size(model.vae)}, {vae.n_latents} latent tokens of width {vae.latent_width}"))
    if told := _gate(model):
        rows.append(("of held-out cells", told))
    rows.append(("diffusion transformer", _size(model.dit) if model.dit else "none: it embeds, and does not generate"))
    if of_all := model.library_sizes.fitted.get((), {}).get(()):
        rows.append(("trained on", f"{of_all.n_cells:,} cells"))
    if commit := (model.origin.get("exported") or {}).get("git"):
        rows.append(("commit", commit))
    rows.append(("weights", model.hash[:12]))
    rows.append(("computes in", f"{model.precision} on {model.device}"))
    return rows


def _gate(model: Networks) -> str:
    """What the autoencoder was found to be worth at the end of its training. Empty where it was not judged."""
    rows = model.history.get("vae")
    found = None if rows is None or "passed" not in rows else rows["passed"].dropna()
    if found is None or not len(found):
        return ""
    beside = "mean profiles: do not trust its cells" if not found.iloc[-1] else "mean profiles"
    return f"the autoencoder knows {'more' if found.iloc[-1] else 'no more'} than {beside}"


def as_text(model: Networks) -> str:
    rows = rows_of(model)
    width = max(len(name) for name, _ in rows)
    return "\n".join(["scldm model", *(f"  {name:<{width}}  {text}" for name, text in rows)])


def as_html(model: Networks) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows_of(model))
    return f"<table><caption>scldm model</caption><tbody>{cells}</tbody></table>"


def _size(network) -> str:
    n = sum(parameter.numel() for parameter in network.parameters())
    return f"{n / 1e6:.1f} million parameters" if n >= 1e6 else f"{n:,} parameters"
