"""Benchmarks, one file each: the work, its controls, its targets."""
