"""A shard set for a person: as text, and as one self-contained HTML page with figures. No block is read.

Reading order: describe_text, describe_html, the figures (plain SVG).
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

import fsspec
import numpy as np

from data_pipeline.format.schema import Manifest, cell_column_path, gene_column_path

MANY = 20  # labels and sources that are listed one by one
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")


def describe_text(url: str, manifest: Manifest) -> str:
    """What a set holds, some dozens of lines."""
    size = sum(s.bytes for s in manifest.shards)
    n_blocks = sum(s.n_blocks for s in manifest.shards)
    stats = manifest.statistics
    lines = [
        f"{url}: {manifest.kind}, {manifest.n_cells:,} cells x {manifest.genes.n_genes:,} genes "
        f"({manifest.genes.namespace} ids, {manifest.genes.hash[:12]})",
        f"  {len(manifest.shards)} shards, {n_blocks:,} blocks of {manifest.block_cells} cells, {manifest.codec}, "
        f"{size / 1e6:,.1f} MB, {size / max(manifest.n_cells, 1):,.0f} bytes a cell",
        f"  expressed genes a cell: {stats.n_nonzeros / max(manifest.n_cells, 1):,.0f} on average, at most "
        f"{stats.n_expressed_largest:,}; largest count {stats.largest_count:,}",
        "  splits",
    ]
    lines += [f"    {s.name:<14}{s.n_cells:>14,} cells{s.n_blocks:>10,} blocks" for s in manifest.splits if s.n_cells]
    lines.append(f"    drawn by {_plain(manifest.split_rule)}, seed {manifest.seed}")
    names = [s.name for s in manifest.splits]
    for name in manifest.conditions.names:
        labels = manifest.conditions.labels[name]
        lines.append(f"  {name}: {len(labels)} labels; cells in {', '.join(names)}")
        table = cells_by_label(manifest, name)
        width = max(len(label) for label in labels[:MANY])
        for label, n in list(zip(labels, table))[:MANY]:
            lines.append(f"    {label:<{width}}" + "".join(f"{k:>12,}" for k in n))
        if len(labels) > MANY:
            lines.append(f"    and {len(labels) - MANY} more")
    if len(manifest.conditions.names) > 1:
        lines.append(f"  combinations of conditions: {len(stats.combinations.ids):,}")
    lines.append(f"  sources: {len(manifest.sources)}")
    for s in manifest.sources[:MANY]:
        what = s["uri"] or f"Census {s['census_version']}"
        lines.append(f"    {what}: {s['layer']}, {s['n_cells']:,} of {s['n_rows']:,} cells")
    if len(manifest.sources) > MANY:
        lines.append(f"    and {len(manifest.sources) - MANY} more")
    dropped = {k: v for k, v in manifest.report.items() if v}
    if dropped:  # as the report has it: how genes were joined, and cells and genes by the reason they were left out
        lines.append(f"  dropped: {_plain(dropped)}")
    lines.append(f"  written by {', '.join(f'{k} {v}' for k, v in manifest.tools.items() if v != 'not installed')}")
    return "\n".join(lines)


def cells_by_label(manifest: Manifest, name: str) -> np.ndarray:
    """(labels, splits) cells of each label of a condition in each split."""
    table = manifest.statistics.combinations
    column = table.by.index(name)
    out = np.zeros((manifest.conditions.n_labels(name), len(manifest.splits)), np.int64)
    for ids, n in zip(table.ids, table.n):
        out[ids[column]] += n
    return out


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} ({_plain(v)})" if isinstance(v, dict) else f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return "/".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "") or "nothing"
    return str(value)


# --- as a page -----------------------------------------------------------------------------------------------------


def describe_html(url: str, manifest: Manifest) -> str:
    """The text, and figures of splits, labels, library sizes, expressed genes and gene means."""
    names = [s.name for s in manifest.splits if s.n_cells]
    spans = [(s.first_cell, s.first_cell + s.n_cells) for s in manifest.splits if s.n_cells]
    parts = []
    if manifest.kind == "cells":
        for column, title in (
            ("total_counts", "library size (counts a cell)"),
            ("n_expressed", "expressed genes a cell"),
        ):
            values = _load(url, cell_column_path(column))
            parts.append(_histogram([values[a:b] for a, b in spans], names, title))
        mean = _load(url, gene_column_path("mean"))
        parts.append(_scatter(mean, _load(url, gene_column_path("fraction_expressed"))))
    for name in manifest.conditions.names:
        table = cells_by_label(manifest, name)
        labels = manifest.conditions.labels[name]
        largest = np.argsort(-table.sum(axis=1), kind="stable")[: 2 * MANY]
        more = f", the {len(largest)} largest of {len(labels)} labels" if len(largest) < len(labels) else ""
        parts.append(
            _bars([labels[k] for k in largest], table[largest], [s.name for s in manifest.splits], name + more)
        )
    figures = "\n".join(f"<figure>{part}</figure>" for part in parts)
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(url)}</title>"
        "<style>body{font:14px sans-serif;margin:2em;max-width:60em}pre{overflow-x:auto}figure{margin:1.5em 0}"
        "svg text{font:11px sans-serif}</style>"
        f"<h1>Shard set</h1><pre>{html.escape(describe_text(url, manifest))}</pre>{figures}\n"
    )


def _load(url: str, path: str) -> np.ndarray:
    with fsspec.open(f"{url.rstrip('/')}/{path}", "rb") as file:
        return np.load(io.BytesIO(file.read()))  # pyright: ignore[reportAttributeAccessIssue]


def _svg(width: int, height: int, title: str, inside: Sequence[str]) -> str:
    head = f'<svg role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return head + f'<text x="0" y="14" font-weight="bold">{html.escape(title)}</text>' + "".join(inside) + "</svg>"


def _legend(names: Sequence[str], y: int) -> list[str]:
    out = []
    for k, name in enumerate(names):
        colour = COLOURS[k % len(COLOURS)]
        out.append(f'<rect x="{130 * k}" y="{y}" width="10" height="10" fill="{colour}"/>')
        out.append(f'<text x="{130 * k + 14}" y="{y + 9}">{html.escape(name)}</text>')
    return out


def _histogram(groups: Sequence[np.ndarray], names: Sequence[str], title: str) -> str:
    """Densities on a logarithmic axis, one line a group."""
    low = np.log10(max(min(g.min() for g in groups), 1))
    high = max(np.log10(max(g.max() for g in groups)), low + 0.1)
    edges = np.linspace(low, high, 61)
    inside = _legend(names, 24)
    heights = [np.histogram(np.log10(np.maximum(g, 1)), edges)[0] / max(len(g), 1) for g in groups]
    top = max(h.max() for h in heights)
    for k, h in enumerate(heights):
        points = " ".join(f"{10 + 600 * (i + 0.5) / 60:.1f},{210 - 160 * v / top:.1f}" for i, v in enumerate(h))
        inside.append(
            f'<polyline fill="none" stroke="{COLOURS[k % len(COLOURS)]}" stroke-width="1.5" points="{points}"/>'
        )
    for x in np.linspace(low, high, 5):
        at = 10 + 600 * (x - low) / (high - low)
        inside.append(f'<text x="{at:.0f}" y="228" text-anchor="middle">{10**x:,.0f}</text>')
    return _svg(640, 240, title, inside)


def _scatter(mean: np.ndarray, fraction: np.ndarray) -> str:
    """Genes: mean count against share of expressing cells; up to 3,000 of them, evenly by rank."""
    seen = np.flatnonzero(mean > 0)
    chosen = seen[np.argsort(mean[seen])][:: max(len(seen) // 3000, 1)]
    if not len(chosen):
        return _svg(640, 40, "no gene is expressed in the training cells", [])
    x, y = np.log10(mean[chosen]), fraction[chosen]
    spread = max(x.max() - x.min(), 0.1)
    inside = [
        f'<circle cx="{10 + 600 * (a - x.min()) / spread:.1f}" cy="{210 - 180 * b:.1f}" r="1.2" fill="{COLOURS[0]}"/>'
        for a, b in zip(x, y)
    ]
    for at, anchor, value in ((10, "start", x.min()), (610, "end", x.max())):
        inside.append(f'<text x="{at}" y="228" text-anchor="{anchor}">{10**value:.2g}</text>')
    silent = len(mean) - len(seen)
    return _svg(640, 240, f"genes: mean count and share of expressing cells ({silent:,} are not expressed)", inside)


def _bars(labels: Sequence[str], table: np.ndarray, splits: Sequence[str], title: str) -> str:
    """Cells of each label, stacked by split."""
    inside, scale = _legend(splits, 24), 400 / max(table.sum(axis=1).max(), 1)
    for row, (label, n) in enumerate(zip(labels, table)):
        y, x = 44 + 16 * row, 180.0
        inside.append(f'<text x="174" y="{y + 10}" text-anchor="end">{html.escape(label[:28])}</text>')
        for k, cells in enumerate(n):
            colour = COLOURS[k % len(COLOURS)]
            inside.append(f'<rect x="{x:.1f}" y="{y}" width="{cells * scale:.1f}" height="12" fill="{colour}"/>')
            x += cells * scale
        inside.append(f'<text x="{x + 4:.1f}" y="{y + 10}">{n.sum():,}</text>')
    return _svg(640, 52 + 16 * len(labels), title, inside)
