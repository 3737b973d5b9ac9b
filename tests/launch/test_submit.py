"""Jobs without a Slurm: the site file, the script, what is refused before anything is submitted, and the script's own
decisions, run by bash with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.cli import VERBS, main
from launch.config import shipped
from launch.job import ON_ALL_RANKS
from launch.site import KEYS, read_site
from scldm.errors import InputError

SBATCH = '#!/bin/bash\necho "$@" >>"$FAKE/sbatch"; echo $((100 + $(wc -l <"$FAKE/sbatch")))\n'
SINFO = '#!/bin/bash\nprintf "%s\\n" "low*|4|gpu:h100:8(S:0-1)" "low*|2|gpu:4" "cpu|9|(null)"\n'
# jobs; or steps, of which there is one besides the batch script's once somebody has made it
SQUEUE = """#!/bin/bash
case "$*" in
    *--steps*) echo 7.batch; if [ -e "$FAKE/step" ]; then echo 7.1; fi ;;
    *) cat "$FAKE/squeue" 2>/dev/null || true ;;
esac
"""
# the nodes of a job, its state, and whether a requeue was asked for
SCONTROL = """#!/bin/bash
case "$*" in
    *hostnames*) printf "%s\\n" ${3//,/ } ;;
    requeue*) echo "$*" >>"$FAKE/requeued"; kill -TERM "$PPID" ;;
    *) echo "JobId=7 JobState=$(cat "$FAKE/job_state" 2>/dev/null || echo RUNNING) Reason=None" ;;
esac
"""
# notes what it was asked to run; the first line of `codes` is its exit code
SRUN = """#!/bin/bash
for word in "$@"; do printf "%s\\n" "$word"; done >"$FAKE/srun.$(ls "$FAKE" | grep -c srun)"
code=$(head -n 1 "$FAKE/codes"); sed -i 1d "$FAKE/codes"
exit "${code:-0}"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for Slurm's commands, first on the PATH, which note in it what they were asked."""
    folder = tmp_path / "fake slurm"
    (folder / "bin").mkdir(parents=True)
    commands = {"sbatch": SBATCH, "sinfo": SINFO, "squeue": SQUEUE, "scontrol": SCONTROL, "srun": SRUN}
    for name, text in commands.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "codes").touch()
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    (tmp_path / "site.sh").write_text(f'SCLDM_PARTITION=low\nSCLDM_GPUS_PER_NODE=8\nSCLDM_SHARED="{tmp_path}"\n')
    monkeypatch.setenv("SCLDM_SITE", str(tmp_path / "site.sh"))
    return folder


def train(tmp_path: Path) -> list[str]:
    return ["train", "vae", "vae/tiny", "data.shards=some shards", f"run_dir={tmp_path}/my runs/50 % vae"]


# --- the site file ---------------------------------------------------------------------------------------------------


def test_a_site_file_is_read_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "site.sh"
    lines = ["# a comment", "", "SCLDM_ACCOUNT=a1", "SCLDM_MODULES='cuda/12 gcc'", "SCLDM_QOS="]
    path.write_text("\n".join([*lines, "SCLDM_NCCL_IB_HCA=mlx5_0"]))
    assert read_site(path) == {"SCLDM_ACCOUNT": "a1", "SCLDM_MODULES": "cuda/12 gcc", "SCLDM_NCCL_IB_HCA": "mlx5_0"}


@pytest.mark.parametrize(
    "line, said",
    [
        ("SCLDM_PARTITON=gpu", "line 1: unknown key SCLDM_PARTITON; did you mean SCLDM_PARTITION"),
        ("SCLDM_NCCL_=x", "unknown key SCLDM_NCCL_"),
        ("PATH=/x", "unknown key PATH"),
        ("SCLDM_QOS=a\nSCLDM_QOS=b", "line 2: SCLDM_QOS is given twice"),
        ("SCLDM_SCRATCH=/scratch/$USER", "nothing is expanded here"),
        ("SCLDM_SCRATCH=`date`", "nothing is expanded here"),
        ("SCLDM_MODULES=a b", "put a value with spaces into quotes"),
        ("SCLDM_MODULES='a", "No closing quotation"),
        ("export SCLDM_QOS=a", "is no SCLDM_KEY=value line"),
        ("SCLDM_GPUS_PER_NODE=eight", "SCLDM_GPUS_PER_NODE='eight' must be a whole number"),
    ],
)
def test_what_a_site_file_can_not_say(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "site.sh").write_text(line + "\n")
    with pytest.raises(InputError, match=said):
        read_site(tmp_path / "site.sh")


def test_the_script_reads_a_site_file_as_submit_does(tmp_path: Path) -> None:
    """The shipped file, and one with every key."""
    settings = (shipped("slurm") / "job.sbatch").read_text().split("# --- the job ---")[0]
    every = "".join(f'{key}="{k} x"\n' for k, key in enumerate(KEYS) if "_PER_" not in key)
    (tmp_path / "every.sh").write_text(f"# all\n{every}SCLDM_NCCL_DEBUG=INFO\nSCLDM_GPUS_PER_NODE=4\n")
    for_sbatch = {"SCLDM_PARTITION", "SCLDM_ACCOUNT", "SCLDM_QOS", "SCLDM_TIME", "SCLDM_MEMORY"}
    for path in (shipped("slurm") / "site.sh", tmp_path / "every.sh"):
        done = subprocess.run(
            ["bash", "-c", settings + "\nenv -0 | grep -z ^SCLDM_"],
            env={"PATH": os.environ["PATH"], "SCLDM_SITE": str(path)},
            capture_output=True,
            text=True,
        )
        found = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
        found = {key: value for key, value in found.items() if value and key != "SCLDM_SITE"}
        assert found == {key: value for key, value in read_site(path).items() if key not in for_sbatch}, done.stderr
    (tmp_path / "wrong.sh").write_text("SCLDM_PARTITON=x\n")
    done = subprocess.run(
        ["bash", "-c", settings], env={"PATH": os.environ["PATH"], "SCLDM_SITE": str(tmp_path / "wrong.sh")}
    )
    assert done.returncode == 2


# --- what is submitted -----------------------------------------------------------------------------------------------


def test_a_submission_keeps_its_script_and_prints_the_job_id(fake: Path, tmp_path: Path, capsys) -> None:
    assert main(["submit", *train(tmp_path), "--nodes", "2-4", "--", "--comment", "it's mine"]) == 0
    assert capsys.readouterr().out == "101\n"
    notes = tmp_path / "my runs" / "50 % vae" / "slurm"
    script = (notes / "job.sbatch").read_text().splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script if line.startswith("#SBATCH --")
    )
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
        ("SCLDM_PARTITION=gpu", [], "SCLDM_PARTITION: partition 'gpu' is unknown; there are: cpu, low"),
        ("", ["--", "-p", "none"], "partition 'none' is unknown"),
        ("SCLDM_GPUS_PER_NODE=16", [], "SCLDM_GPUS_PER_NODE=16: a node of partition low has 8 GPUs"),
        ("", ["--", "--partition=cpu"], "SCLDM_GPUS_PER_NODE=8: a node of partition cpu has 0 GPUs"),
        ("", ["--nodes", "7"], "--nodes 7: partition low has 6 nodes"),
        ("", ["--nodes", "4-2"], "--nodes 4-2: give a number of nodes, or MIN-MAX"),
        ("", ["--nodes"], "--nodes needs a value"),
        ("", ["--stage"], "--stage needs SCLDM_SCRATCH"),
        ("SCLDM_SHARED=/lustre", [], "is not below a folder that all nodes see: SCLDM_SHARED=/lustre"),
        ("SCLDM_SHARED=", [], "each node's own; choose a folder on a shared file system"),
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


def test_no_slurm_on_the_machine(fake: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *train(tmp_path)]) == 2
    assert "there is no Slurm on this machine (sinfo is not on the PATH)" in capsys.readouterr().err


def test_a_run_has_one_job(fake: Path, tmp_path: Path, capsys) -> None:
    assert main(["submit", *train(tmp_path)]) == 0
    (fake / "squeue").write_text("101|RUNNING|None\n")
    assert main(["submit", *train(tmp_path)]) == 2
    assert "job 101 of this run is RUNNING; wait for it, or scancel 101" in capsys.readouterr().err
    (fake / "squeue").write_text("101|TIMEOUT|None\n")
    assert main(["submit", *train(tmp_path)]) == 0


# --- chains ----------------------------------------------------------------------------------------------------------

PIPELINE = ["pipeline", "vae/tiny", "ldm/tiny", "hardware/cpu", "shards.source.paths=c.h5ad", "generate.n=9"]


def test_a_pipeline_is_a_chain_of_jobs(fake: Path, tmp_path: Path, capsys) -> None:
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


@pytest.mark.parametrize(
    "words, said",
    [
        ([*PIPELINE, "out=o", "vae.run_dir=x"], "vae.run_dir=x: the pipeline sets this itself"),
        ([*PIPELINE, "out=o", "wae.train.steps=1"], "wae.train.steps=1: a pipeline takes presets"),
        ([*PIPELINE, "out=o", "ldm.train.stepz=1"], "ldm: train.stepz=1: unknown key"),
        (PIPELINE, "a pipeline needs out=FOLDER"),
        ([*PIPELINE[:-1], "out=o"], "generate: say which cells"),
    ],
)
def test_what_a_pipeline_refuses(fake: Path, capsys: pytest.CaptureFixture, words: list[str], said: str) -> None:
    assert main(["submit", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (fake / "sbatch").exists()


# --- what the script decides -----------------------------------------------------------------------------------------


class Life:
    """Starts of one job's script, each with exit codes of its steps."""

    def __init__(self, fake: Path, tmp_path: Path, *words: str) -> None:
        assert main(["submit", *train(tmp_path), "--preflight", "false", *words]) == 0
        self.fake, self.run_dir = fake, tmp_path / "my runs" / "50 % vae"
        self.notes = self.run_dir / "slurm"

    def start(self, restart: int, *codes: int, step: int | None = None, hosts: str = "n1,n2") -> str:
        """One start with these exit codes; `step` is where the run's last checkpoint is then. Returns the state."""
        (self.fake / "codes").write_text("\n".join(map(str, codes)))
        if step is not None:
            (self.run_dir / "checkpoints").mkdir(exist_ok=True)
            (self.run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}")
        env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": hosts, "SLURM_NTASKS_PER_NODE": "8"}
        env |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        script = str(self.notes / "job.sbatch")
        self.done = subprocess.run(["bash", script], env=os.environ | env, capture_output=True, text=True, timeout=30)
        return (self.notes / "state").read_text().split("\t")[0]

    def steps(self) -> list[list[str]]:
        return [path.read_text().splitlines() for path in sorted(self.fake.glob("srun.*"))]

    @property
    def requeued(self) -> int:
        path = self.fake / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0


def test_every_word_reaches_the_verb_as_it_was_given(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path)
    assert life.start(0, 0, step=9) == "DONE"
    assert life.done.returncode == 0
    (step,) = life.steps()
    assert step[step.index("-m") :] == ["-m", "launch.cli", *train(tmp_path)]
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--nodelist=n1,n2", "--cpu-bind=cores"} <= set(step)


@pytest.mark.parametrize("verb", list(VERBS))
def test_the_script_spreads_over_all_ranks_what_submit_does(verb: str) -> None:
    text = (shipped("slurm") / "job.sbatch").read_text()
    (choice,) = re.findall(r'^case "\$\{1:-\} .*?^esac', text, re.DOTALL | re.MULTILINE)
    words = [*verb.split(), "key=value"]
    done = subprocess.run(["bash", "-c", choice + '\necho "$ranks"', "bash", *words], capture_output=True, text=True)
    assert done.stdout == ("all\n" if verb in ON_ALL_RANKS else "one\n")


def test_a_stopped_run_goes_back_to_the_queue(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path)
    assert life.start(0, 85, step=0) == "REQUEUED"
    assert life.requeued == 1


def test_a_chain_without_progress_ends(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path)
    assert life.start(0, 85, step=5) == "REQUEUED"
    assert life.start(1, 85, step=5) == "FAILED"
    assert life.done.returncode == 1
    assert "no progress since the last requeue (still at 5)" in life.done.stdout
    assert life.requeued == 1


def test_requeues_by_slurm_itself_count_too(fake: Path, tmp_path: Path) -> None:
    """After a lost node the script of that start has no last word."""
    life = Life(fake, tmp_path, "--max-requeues", "3")
    for restart, step in ((0, 0), (1, 4), (2, 8)):
        assert life.start(restart, 0, step=step) == "DONE"
    assert life.start(3, 0, step=8) == "FAILED"
    assert "no progress between the last two requeues (still at 8)" in life.done.stdout
    assert life.start(4, 0, step=12) == "FAILED"
    assert "requeued 4 times; SCLDM_MAX_REQUEUES=3" in life.done.stdout


def test_requeues_are_bounded(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path, "--max-requeues", "1")
    assert life.start(1, 85, step=5) == "FAILED"
    assert life.requeued == 0
    assert "SCLDM_MAX_REQUEUES=1 are used up" in life.done.stdout


@pytest.mark.parametrize("code, state", [(1, "FAILED"), (2, "FAILED"), (86, "STOPPED"), (137, "FAILED")])
def test_what_does_not_go_back_to_the_queue(fake: Path, tmp_path: Path, code: int, state: str) -> None:
    life = Life(fake, tmp_path)
    (fake / "squeue").write_text("8 encode afterok:7(unfulfilled)\n")
    assert life.start(0, code, step=5) == state
    assert life.done.returncode == code
    assert life.requeued == 0
    assert "job 8 (encode) depends on this one and will not run" in life.done.stdout


def test_a_cancelled_job_does_not_come_back(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path)
    (fake / "job_state").write_text("CANCELLED")
    assert life.start(0, 85, step=5) == "STOPPED"
    assert life.requeued == 0


def test_the_nodes_that_preflight_leaves_are_those_that_run(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path, "--preflight", "true", "--nodes", "2-3")
    srun = (fake / "bin" / "srun").read_text()
    (fake / "bin" / "srun").write_text(srun.replace("code=", 'printf "n3\\nn1\\n" >"$SCLDM_NOTES/use_nodes"\ncode='))
    assert life.start(0, 0, 0, hosts="n1,n2,n3") == "DONE"
    first, second = life.steps()
    assert first[first.index("-m") + 1] == "launch.preflight"
    assert "--nodes=3" in first
    assert {"--nodes=2", "--ntasks=16", "--nodelist=n3,n1"} <= set(second)


def test_a_signal_during_preflight_is_no_fault_of_a_node(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path, "--preflight", "true")
    assert life.start(0, 143) == "REQUEUED"
    assert not (life.notes / "bad_nodes").exists()


def test_a_signal_waits_for_the_ranks_to_be_there(fake: Path, tmp_path: Path) -> None:
    """An srun that has not made its step yet ignores signals; told once, it stops."""
    srun = """#!/bin/bash
trap '' USR1
kill -USR1 $PPID
sleep 0.5
trap 'echo x >>"$FAKE/told"; exit 85' USR1
touch "$FAKE/step"
for ((k = 0; k < 80; k++)); do sleep 0.1; done
"""
    life = Life(fake, tmp_path)
    (fake / "bin" / "srun").write_text(srun)
    assert life.start(0, step=5) == "REQUEUED"
    assert (fake / "told").read_text() == "x\n"


def test_a_signal_before_the_ranks_began_is_not_forgotten(fake: Path, tmp_path: Path) -> None:
    """It comes while the script asks for its hosts."""
    scontrol = (fake / "bin" / "scontrol").read_text()
    (fake / "bin" / "scontrol").write_text(scontrol.replace("*hostnames*) ", "*hostnames*) kill -USR1 $PPID; "))
    (fake / "step").touch()
    life = Life(fake, tmp_path)
    (fake / "bin" / "srun").write_text("""#!/bin/bash
trap 'exit 85' USR1
for ((k = 0; k < 80; k++)); do sleep 0.1; done
""")
    assert life.start(0, step=5) == "REQUEUED"
    assert "told to stop: sending SIGUSR1" in life.done.stdout


def test_a_preflight_without_a_report_names_the_first_node(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path, "--preflight", "true")
    assert life.start(0, 3) == "FAILED"
    assert (life.notes / "bad_nodes").read_text().startswith("n1\t")
    assert len(life.steps()) == 1
