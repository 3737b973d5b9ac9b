"""Jobs without a Slurm: the site file, the script, chains, and what is refused before anything is submitted."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.cluster import submit
from launch.cluster.site import for_nodes, read_site
from launch.config import shipped
from scldm.errors import InputError
from tests.launch.fake_slurm import train


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the atlas is that a pipeline begins with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.h5ad").touch()


# --- the site file ---------------------------------------------------------------------------------------------------


def test_a_site_file_is_read_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USER", "me")
    lines = {
        "# a comment": None,
        "": None,
        "SCLDM_ACCOUNT=a1": "a1",
        "SCLDM_GPUS_PER_NODE=a100:8 # eight": "a100:8",
        "SCLDM_TIME= # none": None,
        "SCLDM_QOS=": None,
        "SCLDM_MODULES='cuda/12 gcc' # two": "cuda/12 gcc",
        'SCLDM_CONTAINER="a # b"': "a # b",
        "SCLDM_NCCL_IB_HCA==mlx5_0#1": "=mlx5_0#1",
        "SCLDM_SCRATCH=/scratch/$USER/x": "/scratch/me/x",
        "SCLDM_PYTHON=~/env/bin/python": "/home/me/env/bin/python",
        'SCLDM_SHARED="${HOME}/my runs:/lustre"': "/home/me/my runs:/lustre",
        "SCLDM_JOB_PYTHON='/$odd~'": "/$odd~",
    }
    path = tmp_path / "site.sh"
    path.write_text("\n".join(lines))
    assert list(read_site(path).values()) == [value for value in lines.values() if value]
    text = f'set -a; . "{path}"; for key in "${{!SCLDM_@}}"; do echo "$key=${{!key}}"; done'
    env = {"HOME": "/home/me", "USER": "me"}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, check=True)
    told = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert read_site(path) == {key: value for key, value in told.items() if value}  # a part of the shell's grammar


@pytest.mark.parametrize(
    "line, said",
    [
        ("SCLDM_PARTITON=gpu", "line 1: unknown key SCLDM_PARTITON. Did you mean SCLDM_PARTITION"),
        ("SCLDM_NCCL_=x", "unknown key SCLDM_NCCL_"),
        ("PATH=/x", "unknown key PATH"),
        ("SCLDM_QOS=a\nSCLDM_QOS=b", "line 2: SCLDM_QOS is given twice"),
        ("SCLDM_SCRATCH=/scratch/$SLURM_JOB_ID", "only ~, \\$HOME and \\$USER are filled in"),
        ("SCLDM_SCRATCH=$HOMES", "only ~, \\$HOME and \\$USER are filled in"),
        ("SCLDM_SCRATCH=~other/x", "only ~, \\$HOME and \\$USER are filled in"),
        ("SCLDM_SCRATCH=`date`", "only ~, \\$HOME and \\$USER are filled in"),
        ("SCLDM_SCRATCH=$USER", "line 1: SCLDM_SCRATCH=\\$USER: \\$USER is not set"),
        ("SCLDM_MODULES=a b", "put the value into quotes"),
        ("SCLDM_MODULES='a", "put the value into quotes"),
        ("SCLDM_MODULES='a'b", "put the value into quotes"),
        ("export SCLDM_QOS=a", "is no SCLDM_KEY=value line"),
        ("SCLDM_GPUS_PER_NODE=eight", "SCLDM_GPUS_PER_NODE='eight' must be a whole number, or a type and a number"),
        ("SCLDM_TASKS_PER_NODE=a:1", "SCLDM_TASKS_PER_NODE='a:1' must be a whole number$"),
        ("SCLDM_IMAGE_S=30m", "SCLDM_IMAGE_S='30m' must be a whole number$"),
    ],
)
def test_what_a_site_file_can_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str) -> None:
    monkeypatch.delenv("USER", raising=False)
    (tmp_path / "site.sh").write_text(line + "\n")
    with pytest.raises(InputError, match=said):
        read_site(tmp_path / "site.sh")


def test_the_shipped_site_file_is_read() -> None:
    assert read_site(shipped("slurm") / "site.sh") == {"SCLDM_GPUS_PER_NODE": "8"}


def test_a_container_has_a_python_and_the_jobs_steps_have_that_of_the_submitting_shell() -> None:
    for site, ranks, steps in (
        ({}, sys.executable, sys.executable),
        ({"SCLDM_PYTHON": "/py"}, "/py", "/py"),
        ({"SCLDM_CONTAINER": "image"}, "python", sys.executable),
        ({"SCLDM_CONTAINER": "image", "SCLDM_PYTHON": "/py", "SCLDM_JOB_PYTHON": "/out"}, "/py", "/out"),
    ):
        told = for_nodes(site | {"SCLDM_PARTITION": "low"})
        assert (told["SCLDM_PYTHON"], told["SCLDM_JOB_PYTHON"]) == (ranks, steps)
        assert "SCLDM_PARTITION" not in told


# --- what is submitted -----------------------------------------------------------------------------------------------


def test_a_submission_keeps_its_script_and_prints_the_job_id(fake: Path, tmp_path: Path, capsys) -> None:
    assert main(["submit", *train(tmp_path), "--nodes", "2-4", "--", "--comment", "it's mine"]) == 0
    assert capsys.readouterr().out == "101\n"
    notes = tmp_path / "my runs" / "50 % vae" / "slurm"
    script = (notes / "job.sbatch").read_text().splitlines()
    options = options_of(notes / "job.sbatch")
    assert options["nodes"] == "2-4"
    assert (options["ntasks-per-node"], options["gpus-per-node"], options["partition"]) == ("8", "8", "low")
    assert options["output"] == f'"{notes}/log.txt"'.replace("50 %", "50 %%")
    assert '#SBATCH --comment "it\'s mine"' in script
    assert (fake / "sbatch").read_text() == f"--parsable {notes}/job.sbatch\n"
    assert json.loads((notes / "job.json").read_text())["id"] == "101"


def test_a_dry_run_prints_the_script_and_leaves_nothing(fake: Path, tmp_path: Path, capsys) -> None:
    assert main(["submit", *train(tmp_path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#!/bin/bash")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert not (fake / "sbatch").exists()
    assert not (tmp_path / "my runs").exists()
    (fake / "bin" / "sinfo").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert main(["submit", *train(tmp_path), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out == text.replace("#SBATCH --cpus-per-task=12\n", "").replace("export SCLDM_CPUS_PER_TASK=12\n", "")
    assert err == "not checked against Slurm: sinfo: Unable to contact slurm controller\n"
    assert main(["submit", *train(tmp_path)]) == 2


def options_of(script: Path) -> dict[str, str]:
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --")]
    told = (line.removeprefix("#SBATCH --").partition("=") for line in lines)
    return {name: value for name, _, value in told}


def test_the_usual_words_of_sbatch_are_options_wherever_they_stand(fake: Path, tmp_path: Path) -> None:
    """What they say goes before the site file's, also for what the job itself does with it."""
    script = tmp_path / "my runs" / "50 % vae" / "slurm" / "job.sbatch"
    for words in (
        ["--time", "4:00:00", "--gpus-per-node=4", "--mem", "0", "--nodes", "5-6", "--account", "a"],
        ["--", "-t4:00:00", "--gpus-per-node", "4", "--mem=0", "-N", "5-6", "-A", "a", "--gres=disk:9"],
    ):
        assert main(["submit", *train(tmp_path), *words]) == 0
        options = options_of(script)
        told = [options[name] for name in ("time", "gpus-per-node", "ntasks-per-node", "mem", "nodes", "account")]
        assert told == ["4:00:00", "4", "4", "0", "5-6", "a"]
        assert "export SCLDM_GPUS_PER_NODE=4\n" in script.read_text()
    assert options["gres"] == "disk:9"


def test_gpus_of_one_type(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As many ranks as there are GPUs; a verb that wants one GPU wants one of that type."""
    script = tmp_path / "my runs" / "50 % vae" / "slurm" / "job.sbatch"
    assert main(["submit", *train(tmp_path), "--gpus-per-node", "H100:4"]) == 0
    told = [options_of(script)[name] for name in ("gpus-per-node", "ntasks-per-node", "cpus-per-task")]
    assert told == ["H100:4", "4", "12"], "of the nodes that have such"
    site = tmp_path / "site.sh"
    site.write_text(site.read_text().replace("NODE=8", "NODE=h100:8"))
    embed = ["embed", "model=m", "h5ad=c.h5ad", f"out={tmp_path}/e.h5ad", "--dry-run"]
    capsys.readouterr()
    assert main(["submit", *embed]) == 0
    assert "#SBATCH --gpus-per-node=h100:1\n" in capsys.readouterr().out


@pytest.mark.heavy
def test_a_rank_gets_its_share_of_the_cores_of_the_node(fake: Path, tmp_path: Path) -> None:
    """A GPU's of the node where that is least; 100 CPUs and 8 GPUs on some, 64 and 4 on others."""
    notes = tmp_path / "my runs" / "50 % vae" / "slurm"
    for given, expected in (
        ([], "12"),
        (["--gpus-per-node", "2"], "12"),
        (["--cpus-per-task", "9"], "9"),
        (["--gpus-per-node", "0", "--partition", "cpu"], "16"),
    ):
        assert main(["submit", *train(tmp_path), *given]) == 0
        assert options_of(notes / "job.sbatch")["cpus-per-task"] == expected
        assert f"export SCLDM_CPUS_PER_TASK={expected}\n" in (notes / "job.sbatch").read_text()
    assert main(["submit", "shards", "write", "source.paths=c.h5ad", f"out={tmp_path}/shards"]) == 0
    script = tmp_path / "shards.slurm" / "job.sbatch"
    assert not {"cpus-per-task", "gpus-per-node"} & options_of(script).keys()
    assert "CPUS_PER_TASK" not in script.read_text().split("# --- the job")[0]


def test_nodes_that_a_preflight_named_are_left_out(fake: Path, tmp_path: Path, capsys) -> None:
    notes = tmp_path / "my runs" / "50 % vae" / "slurm"
    notes.mkdir(parents=True)
    (notes / "bad_nodes").write_text("n3\t2026-01-01 00:00:00\tslow\nn5\t2026-01-01 00:00:00\tgone\n")
    assert main(["submit", *train(tmp_path)]) == 0
    assert "#SBATCH --exclude=n3,n5" in (notes / "job.sbatch").read_text()
    assert "n3 (slow)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words, said",
    [
        ("SCLDM_PARTITION=gpu", [], "SCLDM_PARTITION=gpu: partition 'gpu' is unknown. There are: cpu, low"),
        ("", ["--", "-p", "none"], "partition 'none' is unknown"),
        ("", ["--", "-pnone"], "partition 'none' is unknown"),
        ("", ["train.stop_signals=[SIGHUP]"], "train.stop_signals=SIGHUP: a job is told to stop by SIGUSR1"),
        ("", ["--preflight-s", "5"], "preflight_s=5 must be from 20 to 3600"),
        ("SCLDM_GPUS_PER_NODE=16", [], "SCLDM_GPUS_PER_NODE=16: train-vae wants 16 on a node, and a node of partitio"),
        (
            "",
            ["--", "--partition=cpu"],
            "SCLDM_GPUS_PER_NODE=8: train-vae wants 8 on a node, and a node of partition",
        ),
        ("", ["--partition", "cpu", "--gpus-per-node=3"], "--gpus-per-node 3: train-vae wants 3 on a node"),
        ("", ["--gpus-per-node", "a100:4"], "a node of partition low has 0 GPUs of type a100 (types there: h100)"),
        ("SCLDM_GPUS_PER_NODE=h100:9", [], "SCLDM_GPUS_PER_NODE=h100:9: train-vae wants 9 on a node"),
        ("", ["--gpus-per-node", "a100:"], "--gpus-per-node a100:: give a whole number, or a type too, as a100:4"),
        ("", ["--", "-n4"], "--ntasks=4: submit sets this itself. Give --gpus-per-node, or SCLDM_TASKS_PER_NODE"),
        ("", ["--", "--gres", "gpu:4"], "--gres: submit sets this itself. Give --gpus-per-node"),
        ("", ["--", "--array=0-3"], "--array=0-3: submit sets this itself. Give --tasks and --at-once"),
        ("", ["--exclusive"], "--exclusive: neither submit nor train vae has it. Words for sbatch stand at the end"),
        ("", ["-t", "4:00"], "-t: neither submit nor train vae has it. Words for sbatch stand at the end, after --"),
        (
            "SCLDM_GPUS_PER_NODE=0",
            ["hardware.require_gpu=true"],
            "train-vae: hardware.require_gpu=true, and a node has no",
        ),
        ("", ["--nodes", "7"], "--nodes 7: partition low has 6 nodes with 8 GPUs"),
        ("", ["--nodes", "9", "--gpus-per-node", "4"], "--nodes 9: partition low has 8 nodes"),
        ("", ["--nodes", "7", "--gpus-per-node", "h100:4"], "low has 6 nodes with 4 GPUs of type h100"),
        ("", ["--nodes", "5-6", "train.global_batch=32"], "can use only 1, 2, 4 of nodes. Change one of them"),
        ("", ["--nodes", "2", "train.global_batch=30"], "on nodes of 8 ranks can use no number of nodes"),
        ("", ["--nodes", "3", "train.global_batch=16", "--preflight", "false"], "and preflight chooses one"),
        ("SCLDM_SCRATCH=/disk\nSCLDM_CONTAINER=i", ["--stage"], "SCLDM_CONTAINER_MOUNTS needs /disk:/disk"),
        ("SCLDM_CONTAINER=i\nSCLDM_CONTAINER_RUNTIME=docker", [], "SCLDM_CONTAINER_RUNTIME=docker: give one of pyxis,"),
        (
            "SCLDM_CONTAINER=i\nSCLDM_CONTAINER_RUNTIME=podman",
            [],
            "50 % vae: Podman mounts no folder by itself. SCLDM_C",
        ),
        ("", ["--nodes", "4-2"], "--nodes 4-2: give a number of nodes, or MIN-MAX"),
        ("", ["--nodes"], "--nodes needs a value"),
        ("", ["--stage"], "--stage needs SCLDM_SCRATCH"),
        (
            "SCLDM_SCRATCH=/disk",
            ["--stage", "data.shards=s3://b/set"],
            "s3://b/set is no folder that the no",
        ),
        ("SCLDM_SHARED=/lustre", [], "is not below a folder that all nodes see: SCLDM_SHARED=/lustre"),
        ("SCLDM_SHARED=", [], "each node's own. Choose a folder on a shared file system"),
        ("SCLDM_COLOR=red", [], "unknown key SCLDM_COLOR"),
        ("", ["train.stepz=9"], "unknown key 'train.stepz'"),
    ],
)
def test_refused_before_anything_is_submitted(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: str, words: list[str], said: str
) -> None:
    site, key = tmp_path / "site.sh", change.partition("=")[0]
    kept = [line for line in site.read_text().splitlines() if not key or not line.startswith(f"{key}=")]
    site.write_text("\n".join([*kept, change]) + "\n")
    assert main(["submit", *train(tmp_path), *words]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (fake / "sbatch").exists()
    assert not (tmp_path / "my runs").exists()


def test_too_few_nodes_are_left_by_a_preflight(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    notes = tmp_path / "my runs" / "50 % vae" / "slurm"
    notes.mkdir(parents=True)
    (notes / "bad_nodes").write_text("".join(f"{node}\tnow\tslow\n" for node in ("n3", "n7", "c1")))
    assert main(["submit", *train(tmp_path), "--nodes", "5-6"]) == 2
    said = (
        "--nodes 5-6: partition low has 6 nodes with 8 GPUs, and 4 without those that a preflight found unfit: n3, n7"
    )
    assert said in capsys.readouterr().err
    assert not (fake / "sbatch").exists()
    assert main(["submit", *train(tmp_path), "--nodes", "4-6"]) == 0


@pytest.mark.heavy
def test_more_nodes_than_the_batch_can_use_are_told_of(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [*train(tmp_path), "train.global_batch=16", "--dry-run"]
    assert main(["submit", *words, "--nodes", "3"]) == 0
    out, err = capsys.readouterr()
    assert "micro_batch=1 on nodes of 8 ranks can use 2 at most, and leaves the others idle" in err
    assert "SCLDM_MIN_NODES" not in out.split("# --- the job ---")[0]  # all of them must be fit
    assert main(["submit", *words, "--nodes", "2-3"]) == 0
    assert "SCLDM_MIN_NODES=2\n" in capsys.readouterr().out
    assert main(["submit", *words, "--nodes", "1-2"]) == 0
    assert "idle" not in capsys.readouterr().err


def test_no_slurm_on_the_machine(fake: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *train(tmp_path)]) == 2
    assert "there is no Slurm on this machine (sinfo is not on the PATH)" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_run_has_one_job(fake: Path, tmp_path: Path, capsys) -> None:
    assert main(["submit", *train(tmp_path)]) == 0
    (fake / "squeue").write_text("101|FAILED|None\n101|RUNNING|None\n")  # tasks of an array
    assert main(["submit", *train(tmp_path)]) == 2
    assert "job 101 of this run is RUNNING. Wait for it, or scancel 101" in capsys.readouterr().err
    (fake / "squeue").write_text("101|TIMEOUT|None\n")
    assert main(["submit", *train(tmp_path)]) == 0


def submissions() -> list[str]:
    """The command lines of submit that README, docs and `scldm submit --help` give."""
    root = Path(__file__).parents[2]
    pages = [(root / name).read_text().replace("\\\n", " ") for name in ("README.md", "docs/many-nodes.md")]
    lines = [line for text in (*pages, submit.EXAMPLE) for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("scldm submit ")))


@pytest.mark.heavy
@pytest.mark.parametrize("line", submissions())
def test_what_the_texts_submit_is_taken_and_leaves_no_node_idle(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture, line: str
) -> None:
    (tmp_path / "cells.h5ad").touch()
    words = shlex.split(line)[1:]
    assert main(words if "--dry-run" in words else [*words, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "set -- " in out


@pytest.mark.parametrize(
    "words, said",
    [
        (["data/census"], "source.census_version must be given, such as 2025-01-30"),
        (["source.paths=none.h5ad"], "source.paths: none.h5ad: no such file"),
        ([], "source.paths must name"),
    ],
)
@pytest.mark.parametrize("tasks", ["1", "4"])
def test_an_atlas_that_is_not_there_is_found_at_once(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], said: str, tasks: str
) -> None:
    assert main(["submit", "shards", "write", *words, f"out={tmp_path}/shards", "--tasks", tasks]) == 2
    assert said in capsys.readouterr().err
    assert not (fake / "sbatch").exists()


@pytest.mark.heavy
@pytest.mark.timeout(60)
def test_a_chain_that_can_not_be_submitted_as_a_whole_is_not_at_all(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The fourth of ten is one too many; also where scancel does not answer."""
    (tmp_path / "site.sh").write_text(f'SCLDM_PARTITION=cpu\nSCLDM_SHARED="{tmp_path}"\n')
    (fake / "bin" / "sbatch").write_text("""#!/bin/bash
if [ "$(cat "$FAKE/sbatch" 2>/dev/null | wc -l)" = 3 ]; then echo "sbatch: error: QOSMaxSubmit" >&2; exit 1; fi
echo "$@" >>"$FAKE/sbatch"; echo $((100 + $(wc -l <"$FAKE/sbatch")))
""")
    for name, answer in (("one", 'echo "$*" >>"$FAKE/scancel"'), ("two", "echo away >&2; exit 1")):
        (fake / "bin" / "scancel").write_text(f"#!/bin/bash\n{answer}\n")
        (fake / "bin" / "scancel").chmod(0o755)
        (fake / "sbatch").unlink(missing_ok=True)
        assert main(["submit", *PIPELINE, f"out={tmp_path}/{name}", "--tasks", "2"]) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert "QOSMaxSubmit. shards-finish was not submitted, the jobs before it (101, 102, 103) " in err
        assert err.endswith("are cancelled again" if name == "one" else "were, and can't be cancelled: scancel: away")
    assert (fake / "scancel").read_text() == "101 102 103\n"
    assert main(["status", f"{tmp_path}/one"]) == 0
    states = [" ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()]
    assert states[3:] == ["NOT SUBMITTED"] * 7
    assert main(["logs", f"{tmp_path}/one"]) == 0  # and does not wait for them


# --- chains ----------------------------------------------------------------------------------------------------------

PIPELINE = ["pipeline", "vae/tiny", "ldm/tiny", "hardware/cpu", "shards.source.paths=c.h5ad", "generate.n=9"]


@pytest.mark.heavy
def test_a_pipeline_is_a_chain_of_jobs(fake: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "site.sh").write_text(f'SCLDM_PARTITION=cpu\nSCLDM_SHARED="{tmp_path}"\n')
    assert main(["submit", *PIPELINE, f"out={tmp_path}/run", "vae.train.steps=7", "--nodes", "2", "--tasks", "3"]) == 0
    ids = capsys.readouterr().out.split()
    notes = [Path(p) for p in json.loads((tmp_path / "run" / "slurm" / "chain.json").read_text())]
    names = [folder.name for folder in notes]
    assert names == [
        "stage-1",
        "stage-2",
        "stage-3",
        "finish",
        "vae",
        "encode",
        "ldm",
        "export",
        "generate",
        "evaluate",
    ]
    calls = (fake / "sbatch").read_text().splitlines()
    assert "--dependency" not in calls[0]
    for call, before in zip(calls[1:], ids):
        assert f"--dependency=afterok:{before} --kill-on-invalid-dep=yes" in call
    script = (tmp_path / "run" / "slurm" / "vae" / "job.sbatch").read_text()
    (words,) = [shlex.split(line)[2:] for line in script.splitlines() if line.startswith("set -- ")]
    expected = ["train", "vae", "vae/tiny", "hardware/cpu", "train.steps=7"]
    assert words == [*expected, f"data.shards={tmp_path}/run/shards", f"run_dir={tmp_path}/run/vae"]
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --array=0-2\n" in (notes[0] / "job.sbatch").read_text()
    assert "finish=true" in (notes[3] / "job.sbatch").read_text()
    assert "#SBATCH --nodes=1\n" in (notes[-1] / "job.sbatch").read_text()
    # one MLflow run for all of them, which lies on disk before the first job begins; an array's tasks have none
    nested = [f"SCLDM_PARENT={tmp_path}/run\n" in (folder / "job.sbatch").read_text() for folder in notes]
    assert nested == [False] * 3 + [True] * 7
    note = json.loads((tmp_path / "run" / "tracked.json").read_text())
    assert (note["run_name"], note["status"], note["closed_by"]) == ("pipeline", "RUNNING", "evaluate")
    assert "train.steps=7" in note["params"]["vae"]


@pytest.mark.heavy
def test_each_link_has_what_it_asks_for(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with (tmp_path / "site.sh").open("a") as file:
        file.write("SCLDM_CPU_PARTITION=cpu\nSCLDM_TIME=9:00:00\n")
    (tmp_path / "batch.yaml").write_text("train: {global_batch: 960}\nhardware: {micro_batch: 1}\n")
    words = [*PIPELINE, f"out={tmp_path}/run", "vae=batch.yaml", "ldm=batch.yaml", "--tasks", "3", "--at-once", "2"]
    words += ["shards.--mem=64G", "vae.--nodes=2", "vae.--time=48:00:00", "vae.--exclusive", "ldm.--gpus-per-node=4"]
    assert main(["submit", *words, "--", "--comment=all"]) == 0
    found = {}
    for folder in json.loads((tmp_path / "run" / "slurm" / "chain.json").read_text()):
        found[Path(folder).name] = options_of(Path(folder) / "job.sbatch")
    cpu = ["stage-1", "stage-2", "stage-3", "finish", "export", "evaluate"]
    assert [name for name, options in found.items() if options["partition"] == "cpu"] == cpu
    assert [name for name, options in found.items() if "mem" in options] == cpu[:4]
    assert [found[name].get("array") for name in cpu[2:4]] == ["0-2%2", None]
    assert {name for name, options in found.items() if options["time"] != "9:00:00"} == {"vae"}
    asked = {name: (of["nodes"], of["gpus-per-node"]) for name, of in found.items() if "gpus-per-node" in of}
    assert asked == {"vae": ("2", "8"), "encode": ("1", "8"), "ldm": ("1", "4"), "generate": ("1", "8")}
    scripts = {path.parent.name: path.read_text() for path in tmp_path.rglob("job.sbatch")}
    assert [name for name, text in scripts.items() if "--exclusive" in text] == ["vae"]
    assert all("--comment=all" in text for text in scripts.values())
    capsys.readouterr()
    assert main(["submit", *words, "export.--partition=none"]) == 2
    assert "--partition none: partition 'none' is unknown" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_pipeline_without_tracking_has_no_run(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text(f'SCLDM_PARTITION=cpu\nSCLDM_SHARED="{tmp_path}"\n')
    assert main(["submit", *PIPELINE, f"out={tmp_path}/run", "vae.tracking.enabled=false"]) == 0
    assert not (tmp_path / "run" / "tracked.json").exists()
    assert not any("SCLDM_PARENT" in path.read_text() for path in tmp_path.rglob("job.sbatch"))


def test_shards_are_staged_for_the_jobs_that_read_them(fake: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "site.sh").write_text(f'SCLDM_PARTITION=cpu\nSCLDM_SCRATCH=/disk\nSCLDM_SHARED="{tmp_path}"\n')
    assert main(["submit", *PIPELINE, f"out={tmp_path}/run", "--stage"]) == 0
    notes = [Path(p) for p in json.loads((tmp_path / "run" / "slurm" / "chain.json").read_text())]
    on = [folder.name for folder in notes if "SCLDM_STAGE=on\n" in (folder / "job.sbatch").read_text()]
    assert on == ["vae", "encode", "ldm"]
    (tmp_path / "mine.yaml").write_text("data:\n  shards: my set\n")
    words = ["train", "vae", "vae/tiny", "hardware/cpu", f"{tmp_path}/mine.yaml", f"run_dir={tmp_path}/vae"]
    assert main(["submit", *words, "--stage"]) == 0
    assert main(["submit", "encode", f"vae={tmp_path}/vae", "shards=a set", f"out={tmp_path}/z", "--stage"]) == 0
    for folder, expected in (("vae/slurm", "my set"), ("z.slurm", "a set")):
        script = (tmp_path / folder / "job.sbatch").read_text()
        assert f"export SCLDM_SHARDS='{expected}'\n" in script


@pytest.mark.parametrize(
    "words, said",
    [
        ([*PIPELINE, "out=o", "vae.run_dir=x"], "vae.run_dir=x: the pipeline sets this itself"),
        ([*PIPELINE, "out=o", "wae.train.steps=1"], "wae.train.steps=1: a pipeline takes presets"),
        ([*PIPELINE, "out=o", "ldm.train.stepz=1"], "ldm: train.stepz=1: unknown key"),
        (PIPELINE, "a pipeline needs out=FOLDER"),
        ([*PIPELINE[:-1], "out=o"], "generate: give exactly one of conditions, like, shards and n. Given: none"),
    ],
)
def test_what_a_pipeline_refuses(fake: Path, capsys: pytest.CaptureFixture, words: list[str], said: str) -> None:
    assert main(["submit", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (fake / "sbatch").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        ("train vae vae/tiny data.shrds=x", "unknown key 'data.shrds'. Did you mean data.shards"),
        ("encode vae=runs/vae shards=set", "out must be given"),
        ("pipeline vae/tiny ldm/tiny out=o shards.source.paths=a.h5ad ldm.foo=3", "ldm: foo=3: unknown key 'foo'"),
        ("pipeline out=o ldm.train.steps=-1", "ldm: train.steps=-1 must be at least 1"),
    ],
)
def test_what_a_jobs_words_say_wrong_is_refused_before_its_verb_is_imported(
    monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.setattr("launch.cluster.job.importlib", None)
    with pytest.raises(InputError, match=re.escape(said)):
        submit.read(shlex.split(words))
