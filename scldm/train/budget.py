"""What training takes of a machine, before there is one: memory of a rank, bytes between ranks, time."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from scldm.parallel.deepspeed_json import BUCKET
from scldm.train.step_cost import StepCost

MAX_LIVE = 1_000_000_000  # numbers: DeepSpeed's stage3_max_live_parameters and max_reuse_distance


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment that takes most, beyond what process and libraries take.

    weights: whole under ZeRO-1 and 2, where DeepSpeed keeps masters beside them. A share under ZeRO-3 and FSDP2
    gathered: weights of other ranks that ZeRO-3 or FSDP2 holds between forward and backward. Under ZeRO-3 in bf16
        without those of linear maps, which activations have in bf16 at every stage
    masters, moments, ema: shares
    gradients: this rank's share, summed over ranks
    buckets: in which gradients wait to be exchanged during the pass. Under FSDP2 also this rank's share of those that
        were exchanged
    activations: and other tensors of a pass, with the gradients that it holds
    step: what is made after the pass, in the room of activations and buckets
    validation: what a validation pass takes in that room: the weights, put by while the EMA is in their place,
        and no more activations than a training pass has. `scldm plan` adds what a preview takes, if that is more
    host: of the states above, what is in the host's memory instead
    saved: in the host's memory too, where a checkpoint is copied to before it is written
    """

    weights: float
    gathered: float
    masters: float
    moments: float
    ema: float
    gradients: float
    buckets: float
    activations: float
    step: float
    validation: float = 0.0
    host: float = 0.0
    saved: float = 0.0

    @property
    def states(self) -> float:
        return self.weights + self.gathered + self.masters + self.moments + self.ema + self.gradients

    @property
    def training(self) -> float:
        """The most on the device, but for validation."""
        return self.states - self.host + max(self.buckets + self.activations, self.step)

    @property
    def peak(self) -> float:
        """The most on the device."""
        return max(self.training, self.states - self.host + self.validation)

    def to_json(self) -> dict[str, float]:
        return {**asdict(self), "peak": self.peak}


def rank_memory(
    cost: StepCost,
    zero_stage: int,
    n_ranks: int,
    bf16: bool = False,
    offload: bool = False,
    overlap: bool = False,
    bucket: int = BUCKET,
    lazy: bool = False,
) -> Memory:
    """Of one rank under DeepSpeed 0.19.

    cost: of a micro-batch
    overlap: two buckets, one filled while the other is exchanged
    lazy: memory that is not written does not count, as on a CPU
    """
    P, share = cost.n_parameters, cost.n_parameters / n_ranks
    exact = P - cost.linear_parameters if bf16 else P  # linear maps' weights are cast, and kept so among activations
    live = min(P, MAX_LIVE) / P if n_ranks > 1 else 0.0
    in_bucket = 4 * min(bucket, P)
    held = cost.peak_with_gradients_bytes - cost.peak_bytes
    activations, buckets = cost.peak_bytes, bucket * (4 + 2 * bf16) * (1 + overlap)  # in bf16 one of each precision
    if zero_stage == 1:  # all gradients stay to the end of the pass
        activations, buckets = cost.peak_with_gradients_bytes, 0
    elif lazy:
        activations, buckets = cost.peak_bytes + min(held, in_bucket), 0
    if zero_stage == 3:  # a copy of the bucket, cut for the ranks, and what comes of it
        buckets += in_bucket * (1 + 1 / n_ranks)
    return Memory(
        weights=4 * (P if zero_stage < 3 else share),
        gathered=live * 4 * exact if zero_stage == 3 else 0.0,
        masters=4 * share if zero_stage < 3 or offload else 0.0,
        moments=8 * share,
        ema=4 * share,
        gradients=4 * share,
        buckets=buckets,
        activations=activations,
        # ZeRO-1 exchanges all gradients first. AdamW then makes three tensors as large as a share
        step=max(4 * P + in_bucket if zero_stage == 1 else 0.0, 0.0 if offload else 3 * 4 * share),
        validation=(0.0 if offload else 4 * share) + cost.peak_bytes,
        host=20 * share if offload else 0.0,
        saved=4 * 4 * share,  # weights, EMA and both moments
    )


def fsdp_memory(cost: StepCost, zero_stage: int, n_ranks: int, accumulation: int, offload: bool = False) -> Memory:
    """Of one rank under torch's FSDP2, which gathers float32 weights, at zero_stage 2 or 3.

    Activations go block by block in backward, while buckets and this rank's gradients come. Their sum is made for each
    block, and the largest is returned.

    cost: of a micro-batch
    """
    P, share = cost.n_parameters, cost.n_parameters / n_ranks
    of_blocks, block = cost.block_parameters, cost.largest_block
    rest = P - of_blocks
    kept = 4 * share if accumulation > 1 else 0.0  # gradients of the micro-batches before
    # At zero_stage 2 forward ends with the last block twice: whole, and as it was gathered. At 3, beside a block are
    # what the one before it was gathered in, and what the next one is
    at_once = of_blocks + block if zero_stage == 2 else min(3 * block, of_blocks)
    moments: list[tuple[float, float, float]] = [(4 * (rest + at_once), 0.0, cost.block_peaks[0])]
    n_blocks = len(cost.block_peaks) - 1
    for n_over in range(1, n_blocks + 1):
        left = of_blocks * (n_blocks - n_over) / n_blocks
        whole = min(3 * block, left) if zero_stage == 3 else of_blocks if accumulation > 1 else left
        of_rank = block if kept or offload else of_blocks - left  # its gradients, which then go to others or the host
        moments.append((4 * (rest + whole), 4 * (block + of_rank / n_ranks), cost.block_peaks[n_over]))
    gathered, buckets, activations = max(moments, key=sum)
    return Memory(
        weights=4 * share,
        gathered=gathered,
        masters=0.0,
        moments=8 * share,
        ema=4 * share,
        gradients=kept,
        buckets=buckets,
        activations=activations,
        # gradients of the rest and their copy, where the gathered weights were. The fused AdamW makes nothing
        step=max(0.0, 8 * rest + 4 * share - kept - gathered),
        validation=(0.0 if offload else 4 * share) + cost.peak_bytes + moments[0][0] - gathered,
        host=16 * share + kept if offload else 0.0,
        saved=4 * 4 * share,
    )


def sent_bytes(cost: StepCost, zero_stage: int, n_ranks: int, accumulation: int, bf16: bool = False) -> float:
    """Bytes that a rank sends in a step, and receives as many, around a ring: (N - 1) / N of what is exchanged for a
    gather or a scattered sum, twice that for a sum that all get.

    ZeRO-1 sums gradients once a step and gathers weights once. ZeRO-2 sums them once a micro-batch (DeepSpeed sums
    buckets for all ranks). ZeRO-3 scatters the sums, and gathers weights for every forward and every backward pass.
    Source: Rajbhandari et al. 2020 (ZeRO), section 7, and DeepSpeed 0.19.
    """
    ring = (n_ranks - 1) / n_ranks
    exchanged = (2 if bf16 else 4) * cost.linear_parameters + 4 * (cost.n_parameters - cost.linear_parameters)
    if zero_stage == 3:
        return ring * accumulation * 3 * exchanged
    sums = 1 if zero_stage == 1 else accumulation
    return ring * (2 * sums * exchanged + 4 * cost.n_parameters)


def fsdp_sent_bytes(cost: StepCost, zero_stage: int, n_ranks: int, accumulation: int) -> float:
    """Likewise under FSDP2, which exchanges float32. It sums gradients once a micro-batch, to the rank that keeps them.
    At zero_stage 2 it gathers weights once a step. At 3 once a micro-batch, and those of blocks twice."""
    ring, P = (n_ranks - 1) / n_ranks, cost.n_parameters
    gathered = P if zero_stage == 2 else accumulation * (P + cost.block_parameters)
    return ring * 4 * (accumulation * P + gathered)
