"""The plan: what it says of the shipped presets, of what does not fit, and of 1,024 GPUs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.format.read_shards import ShardSet
from data_pipeline.format.schema import read_manifest
from data_pipeline.stream.loader import shard_batches
from data_pipeline.write_latents import LatentWriter
from launch.cli import main
from launch.config import flatten
from launch.plan import cut, read, with_data
from launch.planning.config import PlanLDMConfig, PlanVAEConfig
from launch.planning.layouts import NEAR, compared
from launch.planning.of_encode import WRITTEN_BYTES_S, EncodePlan
from launch.planning.plan import cost_of, does_fit, memory_of, plan_of, preview_bytes, remedies, within_node
from launch.train_ldm import TrainLDMConfig
from launch.train_vae import TrainVAEConfig
from scldm import networks
from scldm.errors import InputError
from scldm.train.budget import fsdp_memory, fsdp_sent_bytes
from tests.data_pipeline.small_sets import known_cells, write_set

pytestmark = pytest.mark.heavy

CONFIGS = Path(__file__).parents[2] / "configs"
DIT = ["n_cells=100_000_000", "n_latents=64", "latent_width=16", "ldm/base"]


def test_a_plan_for_1024_gpus_and_100_million_cells(capsys: pytest.CaptureFixture) -> None:
    words = [*DIT, "hardware/many_nodes", "hardware.nodes=128", "train.global_batch=8192", "hardware.micro_batch=8"]
    assert main(["plan", *words]) == 0
    table = capsys.readouterr().out
    for part in ("9.9 million parameters. 1,024 ranks x 8 cells x 1", "<- configured", "epochs of 100,000,000 cells"):
        assert part in table
    assert "FIT" not in table
    assert "as data.lanes=256, a block is read by 4 ranks, and by one with data.lanes=1024" in table
    assert main(["plan", *words, "json=true", "data.lanes=1024"]) == 0
    once = json.loads(capsys.readouterr().out)
    assert main(["plan", *words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (once["reads_of_a_block"], found["reads_of_a_block"]) == (1, 4)
    assert once["loader_bytes_per_s_and_node"] == pytest.approx(once["cells_per_s"] * 4 * 64 * 16 / 128)
    assert found["loader_bytes_per_s_and_node"] == pytest.approx(4 * once["loader_bytes_per_s_and_node"])
    # a DiT step is six FLOPs a parameter of its blocks and token, and attention
    assert 6 * 64 * 6.2e6 < found["flops_per_cell"] < 6 * 64 * 9.8e6
    assert found["cells_per_s"] * found["step_s"] == pytest.approx(8192)
    assert found["days"] == pytest.approx(200_000 * found["step_s"] / 86_400)
    assert found["epochs"] == pytest.approx(200_000 * 8192 / 1e8)


def test_a_ring_crosses_the_network_of_a_node_once(capsys: pytest.CaptureFixture) -> None:
    """Eight GPUs share 376 GB/s of adapters, and each is charged all of it: rings run side by side."""
    words = [*DIT, "hardware/node_8gpu", "hardware.micro_batch=8", "compare=false"]
    one, four = (plan_of(read([*words, f"hardware.nodes={n}"])) for n in (1, 4))
    assert one.exchange_s == pytest.approx(one.sent_bytes / 370e9)
    assert four.exchange_s == pytest.approx(four.sent_bytes / 370e9)
    slow = plan_of(read([*words, "hardware.nodes=4", "hardware.network_gb_s=3"]))
    assert slow.exchange_s == pytest.approx(slow.sent_bytes / 3e9)
    assert slow.bound_by == "the exchange between ranks"


def test_the_loader_and_saves_are_floors_of_a_step() -> None:
    cells = ["vae/tiny", "hardware/node_8gpu", "n_genes=765", "n_cells=1000", "hardware.micro_batch=5"]
    slow = plan_of(read([*cells, "train.global_batch=40", "hardware.loader_cells_s=10"]))
    assert slow.step_s == pytest.approx(40 / 8 / 10 + slow.save_s)
    assert slow.bound_by == "the loader"
    words = [*DIT, "hardware/node_8gpu"]
    plan = plan_of(read(words))
    assert plan.loader_s == 0
    often = plan_of(read([*words, "train.save_every=1", "hardware.host_copy_gb_s=0.001"]))
    saved = often.by_stage[2].saved
    assert often.step_s - plan.step_s == pytest.approx(saved / 1e6, rel=1e-3)


def test_wasted_nodes_are_named_and_a_better_layout_comes_first(capsys: pytest.CaptureFixture) -> None:
    words = [*DIT, "hardware/many_nodes", "hardware.nodes=64", "train.global_batch=1024", "hardware.micro_batch=2"]
    assert main(["plan", *words]) == 0
    table = capsys.readouterr().out
    assert "64 nodes are wasted on it" in table
    assert "bound by launching kernels" in table
    assert main(["plan", *words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, *others = found["compared"]
    assert first["nodes"] < 64
    assert {row["nodes"] for row in (first, *others)} == {64, 32, 16, 8, 4, 2, 1}
    most = max(row["cells_per_s_and_gpu"] for row in (first, *others))
    assert first["cells_per_s_and_gpu"] >= most / 2
    for row in others:
        assert NEAR * row["cells_per_s"] <= first["cells_per_s"] or row["cells_per_s_and_gpu"] < most / 2


@pytest.mark.slow
def test_what_a_preset_says_of_memory_is_what_plan_says() -> None:
    said = (CONFIGS / "hardware/one_gpu.yaml").read_text()
    found = re.findall(r"vae/(\w+) takes ([\d.]+) GB|vae/(\w+) ([\d.]+) GB", said)
    assert len(found) == 4
    for a, gb_a, b, gb_b in found:
        name, gb = a or b, float(gb_a or gb_b)
        n_genes = 17_002 if name == "dentate_gyrus" else 36_130
        plan = plan_of(read([f"vae/{name}", "hardware/one_gpu", f"n_genes={n_genes}", "n_cells=1000000"]))
        assert plan.by_stage[1].peak / 1e9 == pytest.approx(gb, abs=0.05), name


@pytest.mark.slow  # a plan of a large network takes seconds
@pytest.mark.parametrize("name, million", [("1b", 995), ("3b", 2_859)])
def test_presets_of_billions_say_what_plan_says(name: str, million: int) -> None:
    said = " ".join((CONFIGS / f"vae/{name}.yaml").read_text().replace("\n#", " ").split())
    words = [f"vae/{name}", "n_genes=36130", "n_cells=1000000"]
    ranks = plan_of(read([*words, "hardware/node_8gpu", "hardware.micro_batch=16"]))
    assert ranks.cost.n_parameters / 1e6 == pytest.approx(million, abs=1)
    zero1, zero3 = (f"{ranks.by_stage[stage].peak / 1e9:.1f} GB at ZeRO-{stage}" for stage in (1, 3))
    assert zero1 in said
    assert zero3 in said
    alone = plan_of(read([*words, "hardware/one_gpu", "hardware.micro_batch=16"]))
    assert alone.fits == (name == "1b")
    if alone.fits:
        assert f"One GPU alone takes {alone.by_stage[1].peak / 1e9:.1f} GB" in said
    else:
        offloaded = [*words, "hardware/one_gpu", "hardware.micro_batch=16", "hardware.offload_optimizer=true"]
        found = plan_of(read(offloaded)).by_stage[1]
        assert f"t takes {found.peak / 1e9:.1f} GB, and {found.host / 1e9:.0f} GB of the host" in said
    many = read([*words, "hardware/many_nodes_zero3"]).hardware
    assert (many.zero_stage, many.nodes) == (3, 4)


def test_a_preset_is_planned_for_the_machine_that_it_is_for() -> None:
    def machine(*words: str) -> tuple[str, int, int]:
        hardware = read(["vae/20m", "n_genes=36130", "n_cells=1000", *words]).hardware
        return hardware.gpu, hardware.nodes, hardware.gpus_per_node

    assert machine("hardware/one_gpu") == ("H100", 1, 1)
    assert machine("hardware/node_8gpu") == ("H100", 1, 8)
    assert machine("hardware/many_nodes") == ("H100", 4, 8)
    for words in (("hardware/many_nodes", "hardware.nodes=16"), ("hardware.nodes=16", "hardware/many_nodes")):
        assert machine(*words) == ("H100", 16, 8)
    assert machine("hardware/cpu") == ("CPU", 1, 1)


def test_validation_is_planned_on_whole_cells_and_said_where_it_is_much() -> None:
    """60 million cells of which a tenth is held out: more cells are validated on than trained on."""
    words = ["vae/20m", "hardware/node_8gpu", "n_genes=36130", "n_cells=60000000", "train.validation_cells=0"]
    unknown = plan_of(read(words))
    assert (unknown.validation_s, unknown.validations) == (None, 40)
    assert "validation is not planned" in unknown.of_validation()[0]
    few, many = (plan_of(read([*words, f"n_validation={n}"])) for n in (6_000, 6_000_000))
    assert few.validation_s is not None
    assert many.validation_s == pytest.approx(1_000 * few.validation_s)
    assert len(few.of_validation()) == 1
    assert "40 validations of 6,000,000 whole cells" in many.of_validation()[0]
    assert "validate on fewer cells (train.validation_cells)" in many.of_validation()[1]
    by_default = plan_of(read([*words[:-1], "n_validation=6000000"]))
    assert by_default.validation_s == pytest.approx(20_480 / 6_000 * few.validation_s)  # whole batches
    whole = plan_of(read([*words, "data.given.n_genes=36130", "hardware.micro_batch=16"]))
    of_a_pass = max(whole.compute_s, whole.launch_s) / whole.accumulation / 3  # 16 of 128 cells have no more genes
    assert many.validation_s == pytest.approx(6_000_000 / 8 / 16 * of_a_pass, rel=0.02)


def encode_plan(*words: str) -> EncodePlan:
    plan = plan_of(read(["vae/tiny", "hardware/node_8gpu", "train.preview_share=0", "n_genes=3000", *words])).encode
    assert plan is not None
    return plan


MILLION = ("n_cells=1000000", "train.global_batch=64", "hardware.micro_batch=8")


def test_encoding_is_planned_in_its_own_precision_for_whole_cells_of_all_splits() -> None:
    plan, other = (encode_plan(*MILLION, f"hardware.precision={kind}") for kind in ("bf16", "fp32"))
    assert plan == other, "the verb computes in bfloat16 on a GPU after either training"
    assert plan.compute_s == pytest.approx(plan.n_busiest * plan.flops_per_cell / (989.5e12 * 0.35))
    by_peak = encode_plan(*MILLION, "hardware.precision=bf16", "hardware.peak_tflops=500")
    assert by_peak.compute_s == pytest.approx(plan.compute_s * 989.5 / 500)
    assert encode_plan(*MILLION, "hardware.precision=fp32", "hardware.peak_tflops=9") == plan
    drawn = encode_plan(*MILLION, "data.given.share=0.1")
    assert drawn == encode_plan(*MILLION, "data.given.share=1"), "training draws genes, encoding takes all"
    assert "writes 1,168 GB" in " ".join(encode_plan(*MILLION, "n_cells=2000000000").told(80))
    held_out = encode_plan(*MILLION, "n_validation=500000", "n_test=250000")
    assert held_out.n_cells == 1_750_000
    assert held_out.written_bytes == pytest.approx(1.75 * plan.written_bytes)
    assert encode_plan(*MILLION, "cell_bytes=2000").read_bytes == 2e9
    few = encode_plan(*MILLION, "data.given.policy=expressed", "data.given.share=0", "expressed=300")
    assert few.genes == "expressed"
    assert few.flops_per_cell < plan.flops_per_cell
    # a decoder as deep as the encoder has no part in it
    trained = plan_of(read(["vae/tiny", "hardware/node_8gpu", "n_genes=3000", *MILLION, "data.given.share=1"]))
    assert plan.flops_per_cell < trained.cost.flops / 8 / 3


def test_a_rank_encodes_whole_shards_and_writes_what_it_has_encoded() -> None:
    """16 shards of 65,536 cells: 24 ranks encode no sooner than 16."""
    gpus = {n: (f"hardware.gpus_per_node={n}", f"train.global_batch={8 * n}") for n in (1, 16, 24)}
    alone, all_, more = (encode_plan(*MILLION, *words) for words in gpus.values())
    assert alone.n_busiest == 1_000_000
    assert all_.n_busiest == more.n_busiest == 65_536
    assert all_.seconds == more.seconds
    assert not any("shards are few" in line for line in (*alone.told(80), *all_.told(80)))
    assert any("shards are few for 24 ranks" in line for line in more.told(80))
    fast = encode_plan(*MILLION, "hardware.launch_us=0", "hardware.loader_cells_s=1e9")
    assert fast.seconds == pytest.approx(fast.compute_s + fast.n_busiest * 4 * 8 * 16 / WRITTEN_BYTES_S)
    slow = encode_plan(*MILLION, "hardware.loader_cells_s=10")
    assert (slow.seconds, slow.bound_by) == (slow.n_busiest / 10, "the loader")


def test_encoding_that_does_not_fit_or_is_not_known_is_said(capsys: pytest.CaptureFixture) -> None:
    words = ["plan", "vae/tiny", "hardware/node_8gpu", "n_genes=3000", *MILLION]
    assert main([*words, "compare=false", "hardware.memory_gb=3.001"]) == 0
    assert "give `scldm encode` a smaller batch" in capsys.readouterr().out
    assert main([*words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)["encode"]
    assert found["cells_per_s"] == pytest.approx(found["n_cells"] / found["seconds"])
    unknown = [*words, "compare=false", "hardware.gpu=Z9", "hardware.peak_tflops=9", "hardware.memory_tb_s=1"]
    assert main([*unknown, "hardware.precision=fp32"]) == 0
    assert "`scldm encode` is not planned" in capsys.readouterr().out


def test_ranks_of_a_cpu_do_not_exchange_over_nvlink() -> None:
    words = ["vae/20m", "hardware/cpu", "hardware.gpus_per_node=2", "train.global_batch=8", "hardware.micro_batch=4"]
    plan = plan_of(read([*words, "data.given.gene_set_group=4", "n_genes=36130", "n_cells=1000"]))
    assert 0.2 < plan.exchange_s < 0.4  # measured: 0.18 to 0.32 s for 95 MB, and ZeRO-2 sends half as much again


def test_ranks_of_a_cpu_are_planned_with_its_tiles_and_no_bucket_that_is_never_filled() -> None:
    """Memory that nothing is written to takes none there. A GPU's tiles are a share of its memory."""
    words = [
        "vae/20m",
        "hardware/cpu",
        "hardware.micro_batch=4",
        "train.global_batch=4",
        "n_genes=36130",
        "n_cells=1000",
    ]
    own = [f"data.given.gene_set_group={n}" for n in (1, 4)]
    for group in own:
        cpu, gpu = (read([*words, group, *more]) for more in ((), ("hardware.gpu=H100",)))
        assert memory_of(cpu).buckets == 0 < memory_of(gpu).buckets
        assert cost_of(cpu) == cost_of(replace(cpu, hardware=replace(cpu.hardware, memory_gb=1.0)))
    assert cost_of(cpu).peak_bytes < cost_of(gpu).peak_bytes


def test_no_step_is_promised_that_launching_and_the_optimizer_do_not_allow() -> None:
    """ldm/base computes for 0.9 ms at 35 % of an H100's peak, and launches a thousand kernels."""
    words = [*DIT, "hardware/node_8gpu", "hardware.node_link_gb_s=1e9"]
    plan = plan_of(read(words))
    assert plan.compute_s < 1e-3
    assert plan.kernels is not None
    assert plan.optimizer_s is not None
    assert 700 < plan.kernels < 1_500
    assert plan.launch_s == pytest.approx(5e-6 * plan.kernels)
    assert plan.step_s == pytest.approx(plan.launch_s + plan.optimizer_s, rel=1e-3)
    assert f"{plan.kernels:,} kernels" in plan.table()
    assert plan.to_json()["kernels_per_step"] == plan.kernels
    # two micro-batches launch twice as many; the optimizer runs once, on a rank's share
    half = plan_of(read([*words, "hardware.micro_batch=64"]))
    assert (half.kernels, half.optimizer_s) == (2 * plan.kernels, plan.optimizer_s)
    slow = plan_of(read([*words, "hardware.memory_tb_s=0.335", "hardware.gpus_per_node=4", "hardware.launch_us=0"]))
    assert slow.optimizer_s == pytest.approx(20 * plan.optimizer_s)
    assert slow.step_s == pytest.approx(slow.compute_s + slow.optimizer_s + slow.save_s, rel=1e-3)


def test_what_the_floor_does_not_know_is_said() -> None:
    compiled = plan_of(read([*DIT, "model.compile=true", "hardware.offload_optimizer=true"]))
    assert (compiled.kernels, compiled.optimizer_s) == (None, None)
    assert (
        "or launches (not counted for a compiled network), the optimizer (not counted in the host's memory)"
        in compiled.table()
    )
    small = ["vae/tiny", "n_genes=300", "n_cells=1000", "train.global_batch=64", "hardware.micro_batch=8"]
    plain, fused = (plan_of(read([*small, f"model.attention={kind}"])) for kind in ("plain", "fused"))
    assert plain.kernels == fused.kernels, "fused kernels launch no tiles"


def test_a_preview_is_counted_where_it_takes_more_than_training() -> None:
    words = ["vae/tiny", "hardware/node_8gpu", "hardware.micro_batch=8", "n_genes=30000", "n_cells=1000"]
    words += ["train.global_batch=64"]
    words += ["data.given.gene_set_group=8"]
    without, with_it = (plan_of(read([*words, f"train.preview_share={share}"])) for share in (0, 0.01))
    of_batch = networks.preview_cells(with_it.config.model, 30_000) * networks.cell_bytes(with_it.config.model, 30_000)
    assert 1e8 < of_batch <= networks.PREVIEW_BYTES
    memory, before = with_it.by_stage[2], without.by_stage[2]
    assert memory.validation - before.validation == of_batch - with_it.cost.peak_bytes > 0
    tight = 1e-9 * (before.peak + memory.peak) / 2
    short = plan_of(read([*words, f"hardware.memory_gb={tight}", "hardware.context_gb=0"]))
    assert not short.fits
    assert short.remedies[0] == "train.preview_share=0"
    assert len(set(short.remedies)) == len(short.remedies)
    tighter = [*words, "hardware.micro_batch=64", "train.global_batch=4096", "hardware.context_gb=0"]
    tighter += ["data.given.gene_set_group=64"]
    both = plan_of(read([*tighter, "hardware.memory_gb=0.75"]))  # training is too large, and the preview too
    assert "train.preview_share=0" not in both.remedies
    assert any(remedy.endswith(" train.preview_share=0") for remedy in both.remedies)
    for word in ("hardware.engine=fsdp", "hardware.zero_stage=3"):  # makes none
        assert preview_bytes(read([*words, word])) == 0


def test_gene_sets_of_their_own_take_more() -> None:
    words = ["vae/tiny", "hardware/node_8gpu", "hardware.micro_batch=8", "n_genes=3000", "n_cells=1000"]
    words += ["train.global_batch=64", "train.preview_share=0"]
    own, shared = (cost_of(read([*words, f"data.given.gene_set_group={group}"])) for group in (1, 8))
    assert own.flops > 1.5 * shared.flops
    assert own.peak_bytes > 1.5 * shared.peak_bytes
    of_all = [cost_of(read([*words, f"data.given.gene_set_group={group}", "data.given.share=1"])) for group in (1, 8)]
    assert of_all[0] == of_all[1]


def test_what_does_not_fit_is_told_with_knobs_that_help() -> None:
    words = [*DIT, "hardware.memory_gb=4.2", "train.global_batch=8192", "hardware.micro_batch=1024", "model.n_layers=2"]
    words += ["train.preview_share=0"]
    config = read(words)
    plan = plan_of(config)
    assert not plan.fits
    assert "DOES NOT FIT" in plan.table()
    assert plan.remedies
    told = dict(remedies(config))
    assert all(does_fit(told[remedy]) for remedy in plan.remedies)
    for remedy in plan.remedies:  # each is a command line
        assert does_fit(read([*words, *remedy.split()]))


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "`scldm plan vae ...` or `scldm plan ldm ...`: no preset tells it"),
        (["vae/tiny", "ldm/tiny"], "`scldm plan vae ...` or `scldm plan ldm ...`: the presets are of both"),
        (["vae", "ldm/tiny"], "preset ldm/tiny: unknown key 'model.library_size'"),
        (["vae"], "n_genes=0: give it, or data.shards"),
        (["vae", "n_genes=100"], "n_cells=0: give it, or data.shards"),
        (["ldm/tiny", "latent_width=4"], "n_latents=0: give it, or data.shards"),
        (["ldm/tiny", "vae=nowhere"], "nowhere is not a run folder"),
        (["vae", "n_genes=100", "n_cells=5", "hardware.gpu=Z9"], "hardware.gpu=Z9: known are A100"),
        (
            ["vae", "n_genes=100", "n_cells=5", "hardware.gpu=Z9", "hardware.peak_tflops=9"],
            "Or give hardware.memory_tb_s",
        ),
        (["vae", "n_genes=100", "hardware.launch_us=-1"], "hardware.launch_us=-1.0 must be at least 0"),
        (["vae", "n_genes=100", "n_cells=5", "deepspeed.fp16.enabled=true"], "hardware.precision says this"),
    ],
)
def test_what_a_plan_can_not_know_is_asked_for(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(InputError):
        read(["vae", "hardware.mfu=0"])


def test_a_batch_that_can_not_be_split_is_planned_as_the_nearest_that_can(capsys: pytest.CaptureFixture) -> None:
    words = ["plan", *DIT, "train.global_batch=1000", "json=true"]
    for gpus, batch, micro in ((8, 1_000, 125), (3, 999, 333), (1_024, 1_024, 1), (5, 1_000, 200)):
        assert main([*words, f"hardware.gpus_per_node={gpus}", "hardware.micro_batch=400"]) == 0
        out, err = capsys.readouterr()
        assert err == (
            f"train.global_batch=1000 can't be split over {gpus} ranks with hardware.micro_batch=400. This is a plan "
            f"of train.global_batch={batch} hardware.micro_batch={micro}\n"
        )
        assert json.loads(out)["accumulation"] == 1


def test_of_layouts_that_are_nearly_as_fast_the_simplest_is_recommended() -> None:
    """Of a small model, ZeRO-3 saves 6 % of a step, or more where the network is slow."""
    words = ["vae/20m", "hardware/many_nodes", "hardware.nodes=2", "n_genes=36130", "n_cells=1000000"]
    for network, stage in (("376", 1), ("10", 3)):
        layouts = compared(plan_of(cut(read([*words, f"hardware.network_gb_s={network}"]))))
        (on_two,) = [layout for layout in layouts if layout.config.hardware.nodes == 2]
        assert on_two.config.hardware.zero_stage == stage


# every group of keys that a run takes and a plan does not need
OF_A_RUN = [
    "run_dir=runs/a",
    "data.shards=",
    "tracking.enabled=false",
    "train.patience=2",
    "init_from=m",
    "data.seed=3",
]


@pytest.mark.parametrize(
    "words, planned, trained",
    [
        (["vae/tiny"], PlanVAEConfig, TrainVAEConfig),
        (["vae", "hardware/cpu"], PlanVAEConfig, TrainVAEConfig),
        (["ldm/base", "flow.time=logit_normal", "model.combination_tokens=true"], PlanLDMConfig, TrainLDMConfig),
        (
            ["ldm", "vae=v", "given.policy=random", "given.n_genes=5", "label_embeddings.gene=g.csv"],
            PlanLDMConfig,
            TrainLDMConfig,
        ),
    ],
)
def test_a_plan_takes_what_the_run_takes(words: list[str], planned: type, trained: type) -> None:
    config = read([*words, *OF_A_RUN])
    assert type(config) is planned
    assert {key for key, *_ in flatten(trained)} <= {key for key, *_ in flatten(planned)}


def test_a_plan_knows_the_sizes_of_the_data_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of cells, of latents, and of cells that a trained autoencoder will encode."""
    write_set(tmp_path / "cells", known_cells(n_train=64, n_validation=32, n_genes=700))
    shards = ShardSet(str(tmp_path / "cells"))
    writer = LatentWriter(tmp_path / "latents", shards, "model", (3, 2))
    with writer.begun():
        for shard in writer.missing_shards():
            batches = shard_batches(shards, shard, micro_batch=32)
            writer.write_shard(shard, (np.zeros((len(batch.cell_ids_B2), 3, 2), np.float32) for batch in batches))
        writer.finish()
    shards.close()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": {"n_latents": 4, "latent_width": 5}}))
    cells, latents = f"data.shards={tmp_path}/cells", f"data.shards={tmp_path}/latents"
    found = with_data(read(["vae", cells]))
    assert (found.n_genes, found.n_cells) == (700, 64)
    assert isinstance(found, PlanVAEConfig)
    manifest = read_manifest(str(tmp_path / "cells"))
    assert found.n_test == manifest.n_cells - 64 - 32
    on_disk = sum(file.stat().st_size for file in (tmp_path / "cells").rglob("*.tar"))
    assert found.cell_bytes == on_disk // manifest.n_cells
    assert with_data(read(["vae", cells, "n_cells=9"])).n_cells == 9
    found = with_data(read(["ldm", latents]))
    assert (found.n_latents, found.latent_width, found.n_cells) == (3, 2, 64)
    found = with_data(read(["ldm", cells, f"vae={tmp_path}/run"]))
    assert (found.n_latents, found.latent_width, found.n_cells) == (4, 5, 64)
    # the line of a run, as it would be given to `scldm train`
    small = ["model.width=16", "model.n_layers=1", "train.global_batch=64", "hardware.micro_batch=8", *OF_A_RUN[2:]]
    assert main(["plan", "ldm", cells, f"vae={tmp_path}/run", "run_dir=runs/ldm", "model.n_heads=2", *small]) == 0
    assert "without what encoding the cells as they come takes" in capsys.readouterr().out


def test_a_plan_of_fsdp_has_its_own_stages_memory_and_exchange() -> None:
    words = ["vae/tiny", "hardware/node_8gpu", "hardware.micro_batch=8", "n_genes=300", "n_cells=1000"]
    words += ["train.global_batch=128", "train.preview_share=0"]  # two micro-batches
    theirs, ours = (plan_of(read([*words, f"hardware.engine={engine}"])) for engine in ("deepspeed", "fsdp"))
    assert list(theirs.by_stage) == [1, 2, 3]
    assert ours.by_stage == {stage: fsdp_memory(ours.cost, stage, 8, 2) for stage in (2, 3)}
    assert ours.sent_bytes == fsdp_sent_bytes(ours.cost, 2, 8, 2) == 7 / 8 * 4 * 3 * ours.cost.n_parameters
    assert "     3 " in ours.table()
    assert "     1 " not in ours.table()
    assert {layout.config.hardware.zero_stage for layout in compared(ours)} <= {2, 3}
    assert 0 < ours.cost.largest_block < ours.cost.block_parameters < ours.cost.n_parameters
    kept = read(["vae", "vae/tiny", "hardware/many_nodes_zero3", "hardware.engine=fsdp", "n_genes=300", "n_cells=9"])
    assert within_node(kept) == 0  # a key of deepspeed, which has no effect
    with pytest.raises(InputError, match="hardware.zero_stage=1: hardware.engine=fsdp"):
        read([*words, "hardware.engine=fsdp", "hardware.zero_stage=1"])


def test_weights_that_a_node_keeps_whole_are_counted() -> None:
    """Hierarchical partitioning trades memory, an eighth of the weights a rank, for what goes between nodes."""
    words = ["vae", "vae/70m", "hardware/many_nodes_zero3", "train.global_batch=8192", "n_genes=20000", "n_cells=1000"]
    kept = read(words)
    alone = read([*words, "deepspeed.zero_optimization.zero_hpz_partition_size=1"])
    more = memory_of(kept).weights - memory_of(alone).weights
    assert more == pytest.approx(4 * cost_of(kept).n_parameters / 8)
