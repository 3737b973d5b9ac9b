"""What a job does, from its script to its exit code, with stand-ins for Slurm's commands: stops, preflight, staging."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.cli import main
from launch.config import shipped
from scldm.errors import read_json
from scldm.files import write_json
from scldm.train.tracking import TrackingConfig, begin_note
from tests.launch.fake_slurm import train

pytestmark = pytest.mark.heavy

# the PATH, which /etc/profile has set anew; and the process that Slurm sends its signals to
PROFILE = 'PATH="$FAKE/bin:$PATH"\nexport SCRIPT=$$\n'


def before_the_step(fake: Path, does: str) -> None:
    """A stand-in for srun that does this first."""
    srun = (fake / "bin" / "srun").read_text()
    (fake / "bin" / "srun").write_text(srun.replace("code=", f"{does}\ncode="))


def preflight_says(nodes: str, note: str = "") -> str:
    return f"""echo '{{"use": [{nodes}], "note": "{note}"}}' >"$SCLDM_NOTES/preflight.json\""""


class Life:
    """Starts of one job's script, each with exit codes of its steps."""

    def __init__(self, fake: Path, tmp_path: Path, *words: str, verb: list[str] | None = None) -> None:
        assert main(["submit", *(verb or train(tmp_path)), "--preflight", "false", *words]) == 0
        self.fake, self.run_dir = fake, tmp_path / "my runs" / "50 % vae"
        (fake / ".bash_profile").write_text(PROFILE)
        self.notes = self.run_dir / "slurm"

    def start(
        self, restart: int, *codes: int | str, step: int | None = None, hosts: str = "n1,n2", job: str = "7"
    ) -> str:
        """One start with these exit codes; `step` is where the run's last checkpoint is then. Returns the state."""
        (self.fake / "codes").write_text("\n".join(map(str, codes)))
        if step is not None:
            (self.run_dir / "checkpoints").mkdir(exist_ok=True)
            (self.run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}")
        env = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": hosts, "SLURM_NTASKS_PER_NODE": "8"}
        env |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        env["HOME"] = str(self.fake)
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
    assert {"--distribution=block:block", "--label"} <= set(step)


def test_ranks_may_open_as_many_files_as_the_node_allows(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_DISTRIBUTION", "cyclic")
    monkeypatch.setenv("SCLDM_STAGED", "of another job")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # of a notebook, say, that trained before it submitted
        monkeypatch.setenv(name, "1")
    life = Life(fake, tmp_path)
    before_the_step(
        fake,
        'echo "$(ulimit -Sn) $(ulimit -Hn) ${SLURM_DISTRIBUTION:-none} ${SCLDM_STAGED:-none}'
        ' ${RANK:-none} ${WORLD_SIZE:-none} ${LOCAL_RANK:-none}" >"$FAKE/told"',
    )
    (fake / "bin" / "bash").write_text('#!/bin/sh\nulimit -S -n 100\nexec /bin/bash "$@"\n')
    (fake / "bin" / "bash").chmod(0o755)
    assert life.start(0, 0, step=9) == "DONE"
    soft, hard, *inherited = (fake / "told").read_text().split()
    assert soft == hard != "100"
    assert inherited == ["none"] * 5


def test_a_stopped_run_goes_back_to_the_queue(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path)
    assert life.start(0, 85, step=0) == "REQUEUED"
    assert life.requeued == 1


def test_failures_in_a_row_without_progress_end_a_job(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path, "--max-failures", "2")
    assert life.start(0, 87, step=5) == "REQUEUED"
    assert life.start(1, 87, step=8) == "REQUEUED"
    assert life.start(2, 87, step=8) == "FAILED"
    assert life.done.returncode == 1
    assert "a rank that is gone or hangs: 2 failures without progress (still at 8)" in life.done.stdout
    assert life.requeued == 2


PREEMPTED = "RUNNING Requeue=1 Restarts={} PreemptTime=2026-01-01T00:00:00"
TAKEN = "COMPLETING Requeue=1 Restarts={} PreemptTime=None"


def at(fake: Path, restart: int, told: str) -> None:
    """What Slurm says of the job: within the time of grace, and after it."""
    (fake / "job_state").write_text(told.format(restart + (told is TAKEN)))


@pytest.mark.parametrize("told", [PREEMPTED, TAKEN])
@pytest.mark.parametrize("code", [85, 143, 87, 137, 1])
def test_no_number_of_preemptions_ends_a_job(fake: Path, tmp_path: Path, told: str, code: int) -> None:
    """Whatever its ranks make of the signal, also where nothing was done since the last time."""
    life = Life(fake, tmp_path, "--max-failures", "1")
    for restart in range(4):
        at(fake, restart, told)
        assert life.start(restart, code, step=5) == "REQUEUED"
        assert life.done.returncode == 0
    assert life.requeued == (4 if told is PREEMPTED else 0)  # Slurm has done it
    said = "preemption (" if told is PREEMPTED else "by Slurm ("
    assert said in (life.notes / "state").read_text()


@pytest.mark.parametrize("told", [PREEMPTED, TAKEN])
@pytest.mark.parametrize("code", [138, 143, 1, 3, 137])
def test_preemption_in_preflight_ends_no_job_and_blames_no_node(
    fake: Path, tmp_path: Path, told: str, code: int
) -> None:
    life = Life(fake, tmp_path, "--preflight", "true", "--max-failures", "1")
    before_the_step(fake, 'mkdir -p "$SCLDM_NOTES/preflight" && touch "$SCLDM_NOTES/preflight/n2"')
    for restart in range(3):
        at(fake, restart, told)
        assert life.start(restart, code) == "REQUEUED"
    assert not (life.notes / "bad_nodes").exists()


def test_preemptions_between_failures_neither_count_nor_help(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path, "--max-failures", "2")
    assert life.start(0, 137, step=5) == "REQUEUED"
    at(fake, 1, PREEMPTED)
    assert life.start(1, 85, step=5) == "REQUEUED"
    at(fake, 2, "RUNNING Restarts={}")
    assert life.start(2, 137, step=5) == "FAILED"
    assert life.start(3, 137, step=6) == "REQUEUED"  # had it been started again by hand


def test_the_preemption_of_an_earlier_start_excuses_nothing(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path)
    at(fake, 1, f"{PREEMPTED} StartTime=2026-01-01T00:01:00")
    assert life.start(1, 1, step=5) == "FAILED"


def test_signals_that_slurm_knows_nothing_of_end_no_job(fake: Path, tmp_path: Path) -> None:
    """As `scancel --signal=USR1`."""
    life = Life(fake, tmp_path, "--max-failures", "1")
    at(fake, 0, "RUNNING EndTime=2099-01-01T00:00:00 PreemptTime=None")
    for restart in range(3):
        assert life.start(restart, 85, step=5) == "REQUEUED"


def test_a_time_limit_that_leaves_no_time_for_progress_is_a_failure(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path, "--max-failures", "2")
    end = datetime.now() + timedelta(seconds=300)
    at(fake, 0, f"RUNNING EndTime={end:%Y-%m-%dT%H:%M:%S} PreemptTime=None")
    assert life.start(0, 85, step=5) == "REQUEUED"
    assert life.start(1, 85, step=8) == "REQUEUED"
    assert life.start(2, 85, step=8) == "FAILED"
    assert "stopped by the time limit: 2 failures without progress (still at 8)" in life.done.stdout


@pytest.mark.parametrize("told, state", [("", "CANCELLED"), (" Reason=TimeLimit", "TIMEOUT")])
@pytest.mark.parametrize("code", [85, 1, 137])
def test_what_slurm_ends_is_no_failure(fake: Path, tmp_path: Path, told: str, state: str, code: int) -> None:
    """`scancel` and the time limit: Slurm says COMPLETING, and not restarted."""
    life = Life(fake, tmp_path)
    at(fake, 0, f"COMPLETING Restarts=0{told}")
    assert life.start(0, code, step=5) == state
    assert (life.done.returncode, life.requeued) == (1, 0)


def test_where_no_job_may_requeue_another_one_goes_on(fake: Path, tmp_path: Path) -> None:
    """Dependents follow it, and its failures are counted on."""
    life = Life(fake, tmp_path, "--max-failures", "2")
    scontrol = (fake / "bin" / "scontrol").read_text()
    update = 'update*) echo "$*" >>"$FAKE/updated" ;;'
    (fake / "bin" / "scontrol").write_text(scontrol.replace("    requeue*)", f"    {update}\n    requeue*)"))
    (fake / "squeue").write_text("8 encode afterok:7(unfulfilled)\n9 other afterok:77(unfulfilled)\n")
    with (fake / "bin" / "sbatch").open("a") as file:
        file.write('echo "102 train-vae afterany:7(unfulfilled)" >>"$FAKE/squeue"\n')
    at(fake, 0, "RUNNING Requeue=0 Restarts=0")
    assert life.start(0, 137, step=5) == "REQUEUED"
    assert (life.done.returncode, life.requeued) == (0, 0)
    assert (fake / "sbatch").read_text().splitlines()[
        1
    ] == f"--parsable --dependency=afterany:7 {life.notes}/job.sbatch"
    assert (fake / "updated").read_text() == "update jobid=8 dependency=afterok:102\n"
    assert "will not run" not in life.done.stdout
    assert read_json(life.notes / "job.json")["id"] == "102"
    assert life.start(0, 137, step=5, job=102) == "FAILED"
    assert "2 failures without progress (still at 5)" in life.done.stdout


def test_where_no_job_may_requeue_one_that_is_not_to_run_now_does_not(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path)
    scontrol = (fake / "bin" / "scontrol").read_text()
    (fake / "bin" / "scontrol").write_text(scontrol.replace("    requeue*)", "    update*) exit 1 ;;\n    requeue*)"))
    (fake / "squeue").write_text("8 encode afterok:7(unfulfilled)\n")
    at(fake, 0, "RUNNING Requeue=0 Restarts=0")
    assert life.start(0, 85, step=5) == "REQUEUED"
    assert life.done.returncode == 1  # so that `afterok` is not fulfilled


@pytest.mark.parametrize("code, state", [(1, "FAILED"), (85, "REQUEUED"), (86, "STOPPED")])
def test_a_job_that_failed_fails_its_pipeline_in_mlflow(fake: Path, tmp_path: Path, code: int, state: str) -> None:
    """Also where its verb never came so far as to say so."""
    parent = tmp_path / "pipeline"
    begin_note(parent, TrackingConfig(), "pipeline", {}, closed_by="evaluate")
    life = Life(fake, tmp_path)
    script = life.notes / "job.sbatch"
    script.write_text(script.read_text().replace("\nexport ", f"\nexport SCLDM_PARENT={parent}\nexport ", 1))
    assert life.start(0, code, step=5) == state
    assert read_json(parent / "tracked.json")["status"] == ("FAILED" if state == "FAILED" else "RUNNING")


@pytest.mark.parametrize("code, state", [(1, "FAILED"), (2, "FAILED"), (86, "STOPPED"), (130, "FAILED")])
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
    assert life.start(0, 85, step=5) == "CANCELLED"
    assert life.requeued == 0


AWAY = """if [ "$(ls "$FAKE" | grep -c ^away)" -lt 1 ]; then touch "$FAKE/away.$$"; exit 1; fi; """


@pytest.mark.parametrize("command", ["--oneliner*", "requeue*"])
def test_a_job_outlives_a_controller_that_is_away_for_a_moment(fake: Path, tmp_path: Path, command: str) -> None:
    """It does not say whether the job was cancelled, or does not take the requeue."""
    life = Life(fake, tmp_path)
    scontrol = (fake / "bin" / "scontrol").read_text().replace("    *) echo", "    --oneliner*) echo")
    (fake / "bin" / "scontrol").write_text(scontrol.replace(f"{command}) ", f"{command}) {AWAY}"))
    assert life.start(0, 85, step=5) == "REQUEUED"
    assert life.requeued == 1


@pytest.mark.parametrize("signals, told", [("[SIGUSR2]", "USR2"), ("[SIGHUP,SIGTERM]", "TERM")])
def test_the_ranks_are_told_by_a_signal_that_they_catch(fake: Path, tmp_path: Path, signals: str, told: str) -> None:
    life = Life(fake, tmp_path, f"train.stop_signals={signals}")
    does = f'kill -USR1 $SCRIPT; trap "exit 85" {told}; for ((k = 0; k < 80; k++)); do sleep 0.1; done'
    (fake / "bin" / "srun").write_text(f'#!/bin/bash\ntouch "$FAKE/step"; {does}\n')
    assert life.start(0, step=5) == "REQUEUED"
    assert f"sending SIG{told} to the ranks" in life.done.stdout
    assert "by a signal, at 5" in (life.notes / "state").read_text()


def test_ranks_that_a_signal_of_their_own_list_ended_are_started_again(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path, "train.stop_signals=[SIGUSR2]")
    assert life.start(0, 140, step=5) == "REQUEUED"


def test_a_run_folder_that_a_preset_file_names_reaches_the_script(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"run_dir: {tmp_path}/my runs/50 % vae\n")
    *words, _ = train(tmp_path)
    life = Life(fake, tmp_path, verb=[*words, f"{tmp_path}/mine.yaml"])
    assert life.start(0, 0, step=5) == "DONE"
    (step,) = life.steps()
    assert step[-1] == f"{tmp_path}/mine.yaml"


def test_a_run_folder_does_not_depend_on_the_folder_that_the_job_runs_in(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *words, _ = train(tmp_path)
    monkeypatch.chdir(tmp_path)
    life = Life(fake, tmp_path, verb=[*words, "--run-dir", "my runs/50 % vae"])
    monkeypatch.chdir("/")
    monkeypatch.setenv("PYTHONPATH", str(shipped("slurm").parent))
    assert life.start(0, 0, step=5) == "DONE"
    (step,) = life.steps()
    assert step[-1] == f"run_dir={life.run_dir}"


def test_a_sites_module_command_may_use_what_is_not_set(fake: Path, tmp_path: Path) -> None:
    with (tmp_path / "site.sh").open("a") as file:
        file.write("SCLDM_MODULES='cuda/12 none'\n")
    life = Life(fake, tmp_path)
    with (fake / ".bash_profile").open("a") as file:
        file.write('module() { echo "loads $2 $NOT_SET_ANYWHERE"; [ "$2" != none ]; }\n')
    assert life.start(0, 0, step=5) == "FAILED"
    assert "loads cuda/12 \n" in life.done.stdout
    assert "module load none failed" in life.done.stdout


def test_the_nodes_that_preflight_leaves_are_those_that_run(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path, "--preflight", "true", "--nodes", "2-3")
    before_the_step(fake, preflight_says('"n3", "n1"'))
    assert life.start(0, 0, 0, hosts="n1,n2,n3") == "DONE"
    first, second = life.steps()
    assert first[first.index("-m") + 1] == "launch.cluster.preflight"
    assert "--nodes=3" in first
    assert {"--nodes=2", "--ntasks=16", "--nodelist=n3,n1"} <= set(second)


@pytest.mark.parametrize("code", [138, 143])
def test_a_signal_during_preflight_is_no_fault_of_a_node(fake: Path, tmp_path: Path, code: int) -> None:
    """As `scancel --signal=USR1` sends it, to the ranks alone, which do not catch it yet."""
    life = Life(fake, tmp_path, "--preflight", "true")
    assert life.start(0, code) == "REQUEUED"
    assert not (life.notes / "bad_nodes").exists()


@pytest.mark.parametrize("preflight", ["true", "false"])
def test_a_signal_while_the_profile_is_read_is_not_forgotten(fake: Path, tmp_path: Path, preflight: str) -> None:
    """The very first thing that takes time in a job."""
    life = Life(fake, tmp_path, "--preflight", preflight)
    with (fake / ".bash_profile").open("a") as file:
        file.write("kill -USR1 $$\n")
    (fake / "step").touch()
    (fake / "bin" / "srun").write_text("#!/bin/bash\nfor ((k = 0; k < 80; k++)); do sleep 0.1; done\n")
    assert life.start(0, step=5) == "REQUEUED"
    assert life.requeued == 1


@pytest.mark.parametrize(
    "code, said", [(137, "SIGKILL, as where memory is used up"), (139, "SIGSEGV"), (134, "SIGABRT"), (253, "SIGKILL")]
)
def test_a_killed_rank_is_tried_again_as_long_as_there_is_progress(
    fake: Path, tmp_path: Path, code: int, said: str
) -> None:
    life = Life(fake, tmp_path, "--max-failures", "2")
    assert life.start(0, code, step=5) == "REQUEUED"
    assert f"by a rank killed by {said}" in (life.notes / "state").read_text()
    before_the_step(fake, f"printf step-00000008 >'{life.run_dir}/checkpoints/latest'")  # on the way it saves
    assert life.start(1, code, step=5) == "REQUEUED"
    assert life.start(2, code, step=8) == "FAILED"
    assert life.requeued == 2
    reason = (life.notes / "state").read_text()
    assert f"stopped by a rank killed by {said}" in reason
    assert "2 failures without progress (still at 8)" in reason


class Encoding(Life):
    """A job whose ranks srun ends where one fails."""

    def __init__(self, tmp_path: Path) -> None:
        words = ["vae=a run", "shards=a set", f"out={tmp_path}/latents", "--preflight", "false"]
        assert main(["submit", "encode", *words]) == 0
        self.fake, self.notes = tmp_path / "fake slurm", tmp_path / "latents.slurm"
        (self.fake / ".bash_profile").write_text(PROFILE)


@pytest.mark.parametrize("code", [143, 137])
def test_ranks_that_srun_ends_because_one_failed_are_no_signal(fake: Path, tmp_path: Path, code: int) -> None:
    life = Encoding(tmp_path)
    assert life.start(0, rf"{code} 1\trank 3 on n1: KeyError: x") == "FAILED"
    assert (life.done.returncode, life.requeued) == (1, 0)
    assert (life.notes / "state").read_text().endswith("\texit code 1: rank 3 on n1: KeyError: x\n")
    said = {137: "a rank killed by SIGKILL", 143: "a signal"}[code]  # where no rank left word; that of before is gone
    assert life.start(0, code) == "REQUEUED"
    assert f"by {said}" in (life.notes / "state").read_text()


def test_a_rank_that_fails_while_the_job_is_told_to_stop_is_no_failure(fake: Path, tmp_path: Path) -> None:
    """The others are ended one by one, and it misses them."""
    life = Encoding(tmp_path)
    srun = (fake / "bin" / "srun").read_text()
    (fake / "bin" / "srun").write_text(srun.replace("exit ", 'kill -TERM "$SCRIPT"; sleep 0.2; exit '))
    (fake / "step").touch()
    assert life.start(0, r"143 1\trank 3 on n1: RuntimeError: closed") == "REQUEUED"


def test_a_rank_leaves_word_of_its_failure_and_none_of_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SCLDM_FAILURE", str(tmp_path / "failure"))
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert main(["encode", f"vae={tmp_path}/none", "shards=a set", f"out={tmp_path}/latents"]) == 2
    code, told = (tmp_path / "failure").read_text().split("\t")
    assert code == "2"
    assert told.startswith(f"rank 3 on {os.uname().nodename}: {tmp_path}/none")
    assert told.strip().endswith(capsys.readouterr().err.split("error: ")[1].strip()[-30:])
    (tmp_path / "failure").unlink()
    for name in ("config.json", "manifest.json"):  # a run's and a shard set's
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr("launch.encode.main", lambda config: dist.get_rank(group=7))
    words = ["encode", f"vae={tmp_path}", f"shards={tmp_path}", "out=c"]
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        main(words)  # within torch.distributed
    assert not (tmp_path / "failure").exists()
    for key in ("x", "y"):
        monkeypatch.setattr("launch.encode.main", lambda config, key=key: {}[key])
        with pytest.raises(KeyError):
            main(words)
    assert (tmp_path / "failure").read_text() == f"1\trank 3 on {os.uname().nodename}: KeyError: 'x'\n"  # the first


def test_ranks_that_a_signal_ended_before_they_caught_it_are_started_again(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path)
    assert life.start(0, 138, step=5) == "REQUEUED"
    assert (life.notes / "state").read_text().endswith("by a signal, at 5\n")


def test_a_signal_that_comes_with_the_requeue_does_not_prevent_it(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path)
    scontrol = (fake / "bin" / "scontrol").read_text()
    (fake / "bin" / "scontrol").write_text(scontrol.replace("requeue*) ", "requeue*) kill -USR1 $SCRIPT; sleep 0.2; "))
    assert life.start(0, 85, step=5) == "REQUEUED"
    assert life.requeued == 1
    assert life.done.returncode == 0


def test_a_signal_waits_for_the_ranks_to_be_there(fake: Path, tmp_path: Path) -> None:
    """An srun that has not made its step yet ignores signals; told once, it stops."""
    srun = """#!/bin/bash
trap '' USR1
kill -USR1 $SCRIPT
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
    (fake / "bin" / "scontrol").write_text(scontrol.replace("*hostnames*) ", "*hostnames*) kill -USR1 $SCRIPT; "))
    (fake / "step").touch()
    life = Life(fake, tmp_path)
    (fake / "bin" / "srun").write_text("""#!/bin/bash
trap 'exit 85' USR1
for ((k = 0; k < 80; k++)); do sleep 0.1; done
""")
    assert life.start(0, step=5) == "REQUEUED"
    assert "told to stop: sending SIGUSR1" in life.done.stdout


def test_a_preflight_that_leaves_no_node_says_why(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path, "--preflight", "true")
    before_the_step(fake, preflight_says("", r"every rank failed: KeyError: \"x\""))
    assert life.start(0, 1) == "FAILED"
    assert 'preflight: every rank failed: KeyError: "x". See preflight.json' in (life.notes / "state").read_text()
    assert len(life.steps()) == 1


def test_a_preflight_without_a_report_names_the_first_node(fake: Path, tmp_path: Path) -> None:
    """The other came up: it left its token."""
    life = Life(fake, tmp_path, "--preflight", "true")
    before_the_step(fake, 'mkdir -p "$SCLDM_NOTES/preflight" && touch "$SCLDM_NOTES/preflight/n2"')
    assert life.start(0, 3) == "FAILED"
    (line,) = (life.notes / "bad_nodes").read_text().splitlines()
    assert line.split("\t")[::2] == ["n1", "its first rank gave no report in preflight"]
    assert len(life.steps()) == 1


def test_a_single_node_is_not_blamed_for_a_preflight_without_a_report(fake: Path, tmp_path: Path) -> None:
    """It may be the job: a library that dies on any node."""
    life = Life(fake, tmp_path, "--preflight", "true")
    before_the_step(fake, 'mkdir -p "$SCLDM_NOTES/preflight" && touch "$SCLDM_NOTES/preflight/n1"')
    assert life.start(0, 139, hosts="n1") == "FAILED"
    assert "exit code 139: the first rank, on n1, gave no report" in (life.notes / "state").read_text()
    assert not (life.notes / "bad_nodes").exists()


def test_where_no_rank_of_a_preflight_came_up_no_node_is_named(fake: Path, tmp_path: Path) -> None:
    """As without a Python; what the start before left does not count."""
    life = Life(fake, tmp_path, "--preflight", "true")
    (life.notes / "preflight").mkdir()
    (life.notes / "preflight" / "n2").touch()
    write_json(life.notes / "preflight.json", {"use": ["n1"], "note": ""})
    assert life.start(0, 127) == "FAILED"
    assert "no rank came up on any node. See the log" in (life.notes / "state").read_text()
    assert not (life.notes / "bad_nodes").exists()


def test_a_rank_that_dies_in_preflight_does_not_end_the_others(fake: Path, tmp_path: Path) -> None:
    """They name it; the job goes on without its node."""
    life = Life(fake, tmp_path, "--preflight", "true", "--nodes", "1-2", "--preflight-s", "600")
    before_the_step(fake, preflight_says('"n1"'))
    assert life.start(0, 137, 0) == "DONE"
    first, second = life.steps()
    assert max(k for k, word in enumerate(first) if word.startswith("--kill-on-bad-exit")) == first.index(
        "--kill-on-bad-exit=0", first.index("--kill-on-bad-exit=0") + 1
    )
    assert "--wait=605" in first
    assert "--nodelist=n1" in second


# --- the script: what it does before its Python is there, and where that never is -------------------------------------


def python_of(tmp_path: Path, does: str) -> None:
    """The site's Python for a job's steps, which does this first; it has no packages, but ours."""
    path = tmp_path / "bin python"
    path.write_text(f'#!/bin/bash\n{does}\nexec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    with (tmp_path / "site.sh").open("a") as file:
        file.write(f'SCLDM_JOB_PYTHON="{path}"\n')


def test_signals_wait_for_the_jobs_python_which_needs_no_packages(fake: Path, tmp_path: Path) -> None:
    """Those to the script, as Slurm sends them before the time limit; those to all of its processes end none."""
    python_of(tmp_path, 'kill -USR1 $SCRIPT; kill -USR1 $$; kill -TERM $$; sleep 0.2; touch "$FAKE/step"')
    life = Life(fake, tmp_path)
    before_the_step(fake, 'trap "exit 85" USR1; for ((k = 0; k < 80; k++)); do sleep 0.1; done')
    assert life.start(0, step=5) == "REQUEUED", life.done.stdout + life.done.stderr
    assert life.done.stdout.count("told to stop: sending SIGUSR1") == 1


@pytest.mark.parametrize(
    "does, said",
    [
        ("exit 127", "ended with exit code 127 on n1 and left no word"),
        ("cd /; unset PYTHONPATH", "ended with exit code 1 on n1 and left no word"),  # it has no scldm
        ("(sleep 1; kill -KILL $$) &", "ended with exit code 137 on n1 and left no word"),
    ],
)
def test_a_python_that_can_not_run_the_job_is_noted_and_named(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, said: str
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    python_of(tmp_path, does)
    life = Life(fake, tmp_path)
    before_the_step(fake, "sleep 3")
    (life.notes / "state").write_text("REQUEUED\t7\t1\t0\tby a signal, at 5\n")  # of the start before
    assert life.start(1, 0, step=5) == "FAILED"
    assert life.done.returncode in (1, 127, 137)
    _, job, _, restart, why = (life.notes / "state").read_text().split("\t")
    assert (job, restart) == ("7", "1")
    assert why.startswith(f"{tmp_path}/bin python -P -m launch.cluster.job_steps {said}")


def test_an_error_of_the_steps_themselves_is_noted(fake: Path, tmp_path: Path) -> None:
    life = Life(fake, tmp_path)
    scontrol = (fake / "bin" / "scontrol").read_text()
    (fake / "bin" / "scontrol").write_text(scontrol.replace("*hostnames*) ", "*hostnames*) echo away >&2; exit 1; "))
    assert life.start(0, step=5) == "FAILED"
    assert (life.notes / "state").read_text().endswith("\tscontrol: away\n")
    (life.notes / "failure").mkdir()  # what nobody thought of
    (fake / "bin" / "scontrol").write_text(scontrol)
    assert life.start(0, step=5) == "FAILED"
    assert "IsADirectoryError" in (life.notes / "state").read_text()
    assert "Traceback" in life.done.stderr


# --- with sbatch, by hand --------------------------------------------------------------------------------------------


def by_hand(fake: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    (fake / ".bash_profile").write_text(PROFILE)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1,n2", "HOME": str(fake), "SCLDM_PYTHON": sys.executable}
    script = str(shipped("slurm") / "job.sbatch")
    return subprocess.run(
        ["bash", script, *words], env=os.environ | job | env, capture_output=True, text=True, timeout=100
    )


def test_a_job_sent_by_hand_does_what_a_submitted_one_does(fake: Path, tmp_path: Path) -> None:
    """It finds in presets, too, what it makes; its environment goes before the site file, not another job's."""
    (tmp_path / "mine.yaml").write_text(f"run_dir: {tmp_path}/run\ntrain:\n  stop_signals: [SIGTERM]\n")
    with (tmp_path / "site.sh").open("a") as file:
        file.write("SCLDM_NCCL_DEBUG=INFO # all\nSCLDM_UCX_TLS=tcp\nSCLDM_CPUS_PER_TASK=3\n")
    before_the_step(fake, 'echo "$NCCL_DEBUG $UCX_TLS" >"$FAKE/told"')
    *words, _ = train(tmp_path)
    env = {"SCLDM_UCX_TLS": "rc", "SCLDM_PREFLIGHT": "off", "SCLDM_MADE": "another's", "SCLDM_RANKS": "one"}
    done = by_hand(fake, *words, f"{tmp_path}/mine.yaml", **env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "slurm" / "state").read_text().startswith("DONE\t7\t")
    assert (fake / "told").read_text() == "INFO rc\n"
    (step,) = [path.read_text().splitlines() for path in fake.glob("srun.*")]
    assert {"--ntasks=16", "--cpus-per-task=3"} <= set(step)
    assert step[-1] == f"{tmp_path}/mine.yaml"


@pytest.mark.parametrize("code, state", [(86, "STOPPED"), (1, "FAILED")])
def test_how_a_job_sent_by_hand_ended_is_said_once(fake: Path, tmp_path: Path, code: int, state: str) -> None:
    before_the_step(fake, f"exit {code}")
    done = by_hand(fake, *train(tmp_path), SCLDM_PREFLIGHT="off")
    assert done.returncode == code, done.stdout + done.stderr
    assert next(tmp_path.rglob("slurm/state")).read_text().startswith(f"{state}\t7\t")
    assert "left no word" not in done.stdout
    assert "No such file" not in done.stderr


def test_what_is_refused_of_a_job_sent_by_hand(fake: Path, tmp_path: Path) -> None:
    done = by_hand(fake, *train(tmp_path), "train.stepz=1")
    assert (done.returncode, "unknown key 'train.stepz'" in done.stderr) == (2, True), done.stderr
    done = by_hand(fake, "shards", "write", f"out={tmp_path}/x", "source.paths=c", SCLDM_STAGE="on")
    assert (done.returncode, "read no shards that could be staged" in done.stderr) == (2, True), done.stderr
    (tmp_path / "site.sh").write_text("SCLDM_PARTITON=x\n")
    done = by_hand(fake, *train(tmp_path))
    assert (done.returncode, "Did you mean SCLDM_PARTITION" in done.stderr) == (2, True), done.stderr
    assert not list(fake.glob("srun.*"))


# --- staging ---------------------------------------------------------------------------------------------------------

# a job of one node: the keeper of what is staged, the copy, and the verb, each of which notes what it does and when
NODE = """#!/bin/bash
words=("$@")
while [[ ${1:-} == -* ]]; do shift; done
case "$*" in
    *keeper*)
        sleep 0.3 # before the step has begun
        echo "keeper ${words[*]}" >>"$FAKE/steps"
        "$@" <&0 &
        echo $! >"$FAKE/keeper"
        wait
        echo "removed" >>"$FAKE/steps" ;;
    *launch.cluster.copy_shards*)
        echo "stage ${words[*]}" >>"$FAKE/steps"
        for word in "$@"; do case $word in out=*) mkdir -p "${word#out=}/shards" ;; esac; done ;;
    *) echo "verb ${words[*]} from $SCLDM_STAGED" >>"$FAKE/steps"; exit "$(cat "$FAKE/code")" ;;
esac
"""


@pytest.fixture
def staging(fake: Path, tmp_path: Path) -> Life:
    with (tmp_path / "site.sh").open("a") as file:
        file.write(f'SCLDM_SCRATCH="{tmp_path}/its disk"\n')
    (fake / "bin" / "srun").write_text(NODE)
    return Life(fake, tmp_path, "--stage")


@pytest.mark.parametrize("code, state", [(0, "DONE"), (85, "REQUEUED"), (1, "FAILED")])
def test_what_is_staged_is_removed_before_a_job_ends_or_goes_back(
    staging: Life, fake: Path, tmp_path: Path, code: int, state: str
) -> None:
    (fake / "code").write_text(str(code))
    scontrol = (fake / "bin" / "scontrol").read_text()
    (fake / "bin" / "scontrol").write_text(scontrol.replace("requeue*) ", 'requeue*) echo requeue >>"$FAKE/steps"; '))
    assert staging.start(0, step=5, hosts="n1") == state
    what = [line.split()[0] for line in (fake / "steps").read_text().splitlines()]
    assert what == ["keeper", "stage", "verb", "removed", *(["requeue"] if state == "REQUEUED" else [])]
    assert not (tmp_path / "its disk" / "scldm-7").exists()


def test_nothing_is_staged_that_no_step_would_remove(staging: Life, fake: Path) -> None:
    (fake / "bin" / "srun").write_text(NODE.replace("sleep 0.3", "exit 1"))
    assert staging.start(0, step=5, hosts="n1") == "FAILED"
    assert "the step that removes what is staged did not start on all of 1 nodes" in staging.done.stdout
    assert not (fake / "steps").exists()


def test_what_is_staged_is_removed_although_slurm_starts_no_step_any_more(
    staging: Life, fake: Path, tmp_path: Path
) -> None:
    """At the time limit all are told to end, the keeper too; it stays until the ranks are gone."""
    (fake / "code").write_text("143")
    (fake / "job_state").write_text("COMPLETING Reason=TimeLimit")
    told = 'keeper=$(cat "$FAKE/keeper"); kill -TERM $keeper $(cat "/proc/$keeper/task/$keeper/children")'
    text = NODE.replace('exit "$(cat', f'{told}; exit "$(cat')
    (fake / "bin" / "srun").write_text(text)
    assert staging.start(0, step=5, hosts="n1") == "TIMEOUT"
    assert not (tmp_path / "its disk" / "scldm-7").exists()


def test_the_ranks_read_what_is_staged_and_their_words_name_the_set(staging: Life, fake: Path, tmp_path: Path) -> None:
    (fake / "code").write_text("0")
    staging.start(0, step=5, hosts="n1")
    verb = (fake / "steps").read_text().splitlines()[2]
    assert " data.shards=some shards " in verb
    assert verb.count("shards=") == 1
    assert verb.endswith(f" from {tmp_path}/its disk/scldm-7")
