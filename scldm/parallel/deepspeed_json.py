"""DeepSpeed's own configuration: what ours says in its words, and any other key that can't change the result."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from scldm.errors import InputError
from scldm.files import flat

BUCKET = 50_000_000  # numbers that are exchanged at once

# what a key of ours says already, so that two can't disagree
ELSEWHERE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "hardware.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and hardware.micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    **dict.fromkeys(("torch_autocast", "fp16", "bf16", "amp", "fp32", "data_types"), "hardware.precision"),
    "activation_checkpointing": "model.recompute",
    "zero_optimization.stage": "hardware.zero_stage",
    "zero_optimization.offload_optimizer.device": "hardware.offload_optimizer",
}
# what would train other weights, or weights that a checkpoint of ours could not find
RESULT = {
    "communication_data_type": "gradients are summed in it",
    "seq_parallel_communication_data_type": "gradients are summed in it",
    "prescale_gradients": "it changes how gradients are summed",
    "gradient_predivide_factor": "it changes how gradients are summed",
    "gradient_allreduce_op": "it changes how gradients are summed",
    "sparse_gradients": "it changes how gradients are summed",
    "managed_gradient_accumulation": "it changes which gradients make a step",
    "disable_allgather": "ranks would compute with different weights",
    "check_overflow": "it changes which steps are made",
    "zero_allow_untested_optimizer": "the optimizer is torch's AdamW",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's AdamW",
    "compression_training": "it changes the network",
    "progressive_layer_drop": "it changes the network",
    "hybrid_engine": "it changes the network",
    "quantize_training": "it changes the weights",
    "eigenvalue": "it changes the weights",
    "curriculum_learning": "the order of cells is the loader's",
    "data_efficiency": "the order of cells is the loader's",
    "dataloader_drop_last": "the order of cells is the loader's",
    "checkpoint": "checkpoints are ours",
    "autotuning": "it ends the process instead of training",
    "elasticity": "any world size can resume a checkpoint",
    "pipeline": "every rank runs the whole network",
    "tensor_parallel": "every rank runs the whole network",
    "autotp_size": "every rank runs the whole network",
    "sequence_parallel_size": "every rank runs the whole network",
    "expert_parallel": "every rank runs the whole network",
    "use_data_before_expert_parallelism": "every rank runs the whole network",
    "zero_optimization.zero_quantized_weights": "weights would be rounded",
    "zero_optimization.zero_quantized_nontrainable_weights": "weights would be rounded",
    "zero_optimization.zero_quantized_gradients": "gradients would be rounded",
    "zero_optimization.compute_grad_norm": "gradients are clipped by their norm",
    "zero_optimization.zenflow": "it applies gradients late",
    "zero_optimization.ignore_unused_parameters": "it changes which gradients make a step",
    "zero_optimization.leaf_module": "gradients of parameters that a module reads of others would be lost",
    "zero_optimization.stage3_module_granularity_threshold": "gradients of parameters read of others would be lost",
    "zero_optimization.mics_shard_size": "checkpoints hold every number once, MiCS holds some twice",
    "zero_optimization.mics_hierarchical_params_gather": "checkpoints hold every number once, MiCS holds some twice",
    "zero_optimization.offload_optimizer.nvme_path": "checkpoints hold what is in memory",
    "zero_optimization.offload_optimizer.ratio": "a part of the optimizer would be another one",
    "zero_optimization.offload_optimizer.super_offload": "it is another optimizer",
    "zero_optimization.elastic_checkpoint": "checkpoints are ours",
    "zero_optimization.load_from_fp32_weights": "checkpoints are ours",
    "zero_optimization.cpu_offload": "it is the old name of hardware.offload_optimizer",
    "zero_optimization.cpu_offload_param": "it is the old name of offload_param",
    "zero_optimization.legacy_stage1": "it is another optimizer",
}
# what does not work
UNSUPPORTED = {
    "zero_optimization.offload_param": "weights stay on the device. hardware.offload_optimizer moves what is larger",
}
# the other keys of DeepSpeed 0.19.8, which ignores those of its own configuration that it does not know
FREE = (
    *("aio", "comms_logger", "compile", "csv_monitor", "disable_python_gc", "dump_state", "flops_profiler"),
    *("log_level", "memory_breakdown", "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown", "wandb"),
    *("zero_optimization", "comet", "use_node_local_storage"),
)
FREE_ZERO = (
    *("allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "enable_sanity_checks"),
    *("log_trace_cache_warnings", "memory_efficient_linear", "offload_optimizer", "overlap_comm"),
    *("parameter_alignment", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "sub_group_size"),
    *("stage3_allgather_sequential", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_model_persistence_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size"),
    *("stage3_use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zero_hpz_partition_size"),
)


def deepspeed_json(
    micro_batch: int,
    accumulation: int,
    clip: float,
    zero_stage: int,
    bf16: bool,
    offload_optimizer: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration as it is given to it and kept in the run folder.

    overrides: nested, as `deepspeed.KEY=value` gives them

    Raises: InputError for a key among them that is unknown or would change the result.
    """
    check_overrides(overrides or {})
    # DeepSpeed's own 500 million take 2 GB. 50 million (200 MB) are a few to a backward pass of these networks
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: FusedAdam and CPUAdam need a compiler at start
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        "steps_per_print": 1_000_000_000,
    }
    return _merged(ours, overrides or {})


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raises: InputError for the first key that is another key's of ours, would change the result, or is unknown."""
    for key, value in flat(overrides):
        for name in accumulate(key.split("."), "{}.{}".format):  # `a`, `a.b` and `a.b.c` of `a.b.c`
            if name in ELSEWHERE:
                raise InputError(f"deepspeed.{key}={value}: {ELSEWHERE[name]} says this")
            if name in RESULT:
                raise InputError(f"deepspeed.{key}={value} would change the result: {RESULT[name]}")
            if name in UNSUPPORTED:
                raise InputError(f"deepspeed.{key}={value}: {UNSUPPORTED[name]}")
        top, _, below = key.partition(".")
        if top not in FREE:
            raise InputError(f"deepspeed.{key}={value}: DeepSpeed knows no key {top!r}{_nearest(top, FREE)}")
        name = below.split(".")[0]
        if top == "zero_optimization" and name not in FREE_ZERO:
            raise InputError(f"deepspeed.{key}={value}: {top} has no key {name!r}{_nearest(name, FREE_ZERO)}")


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f". Did you mean {', '.join(near)}?" if near else f". There are: {', '.join(sorted(known))}"


def _merged(ours: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
