"""Measured figures and the code that makes them: `python -m benchmarks.NAME --help`. Not in the wheel.

One file a benchmark: the work, its controls, its targets. The JSON files here are their results.
"""
