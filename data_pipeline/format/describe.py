"""A shard set as text for a person. page.py draws the same. No block is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.format.schema import Manifest

MANY = 20  # labels and sources that are listed one by one


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
        f"{stats.n_expressed_largest:,}, largest count {stats.largest_count:,}",
        "  splits",
    ]
    lines += [f"    {s.name:<14}{s.n_cells:>14,} cells{s.n_blocks:>10,} blocks" for s in manifest.splits if s.n_cells]
    lines.append(f"    drawn by {_plain(manifest.split_rule)}, seed {manifest.seed}")
    names = [s.name for s in manifest.splits]
    for name in manifest.conditions.names:
        labels = manifest.conditions.labels[name]
        lines.append(f"  {name}: {len(labels)} labels, cells in {', '.join(names)}")
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
