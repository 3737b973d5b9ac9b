"""DeepSpeed's configuration: ours in its words, the user's own keys, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from scldm.errors import InputError
from scldm.parallel.deepspeed_json import (
    ELSEWHERE,
    FREE,
    FREE_ZERO,
    RESULT,
    UNSUPPORTED,
    check_overrides,
    deepspeed_json,
)


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def test_overrides_are_merged_into_ours() -> None:
    overrides = {"zero_optimization": {"overlap_comm": True, "offload_optimizer": {"pin_memory": False}}}
    found = deepspeed_json(4, 2, 1.0, 2, True, offload_optimizer=True, overrides=overrides)
    assert found["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert (found["gradient_accumulation_steps"], found["torch_autocast"]["enabled"]) == (2, True)
    assert overrides["zero_optimization"].keys() == {"overlap_comm", "offload_optimizer"}


@pytest.mark.parametrize("key", [*ELSEWHERE, *RESULT, *UNSUPPORTED])
def test_what_would_change_the_result_is_refused_by_name(key: str) -> None:
    for value in (1, {"enabled": True}):
        with pytest.raises(InputError, match=f"deepspeed.{key}") as refusal:
            check_overrides(nested(key, value))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "key, said",
    [
        ("steps_per_prin", "knows no key 'steps_per_prin'. Did you mean steps_per_print"),
        ("zero_optimization.overlapcomm", "zero_optimization has no key 'overlapcomm'. Did you mean overlap_comm"),
        ("zero_optimization.offload_param.device", "weights stay on the device"),
    ],
)
def test_a_key_that_deepspeed_would_ignore_is_refused(key: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_overrides(nested(key, "nvme"))


@pytest.mark.slow
def test_the_keys_are_all_of_this_deepspeed() -> None:
    """A key that a new version brings must be judged before a user can set it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {str(field.alias or name) for name, field in DeepSpeedZeroConfig.model_fields.items()}
    refused = {key.split(".")[1] for key in (*ELSEWHERE, *RESULT, *UNSUPPORTED) if key.startswith("zero_optimization.")}
    assert set(FREE_ZERO) <= theirs
    unknown = theirs - set(FREE_ZERO) - refused
    # what only the old names, the checkpoints of DeepSpeed or optimizers that are not ours would read
    assert unknown == {
        "cpu_offload_use_pin_memory",
        "override_module_apply",
        "pipeline_loading_checkpoint",
        "save_muon_momentum_buffer_in_memory",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
    }
    assert "zero_optimization" in FREE
