"""Benchmarks that need more than the package: other people's methods. Not in the wheel. The JSON files here are results
of these and of `scldm bench`."""
