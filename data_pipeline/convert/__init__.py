"""From an atlas to a shard set: sources, genes, splits, the shuffle, the writer, and what checks it."""
