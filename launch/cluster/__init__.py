"""Slurm: jobs, pipelines, preflight, copies of shards on a node, status and logs."""
