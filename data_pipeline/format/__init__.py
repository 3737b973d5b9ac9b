"""What a shard set is: blocks, manifest, statistics, and how one is read."""
