"""From a set to batches: the order, the gather, gene sets, the loader."""
