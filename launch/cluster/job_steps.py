"""What a Slurm job does, from its first word to its exit code. slurm/job.sbatch runs it once, on the job's first node.

    begin        note the start
    image        bring the container's image to each node, where the site has one
    preflight    check the nodes, and choose those to run on
    stage        copy the shards to each node's own disk
    verb         one rank per GPU

The verb saves and stops on a signal. Then the job goes back to the queue by itself, and its next start resumes. What
Slurm does (preemption, a lost node, a requeue) never ends it. Failures of its own do, some in a row without progress.
Before anything is called a failure, Slurm is asked. Where it lets no job requeue, a new job of the same script goes on.

It needs Python and Slurm's commands, but none of the verbs' packages. Its settings are SCLDM_ variables, which `scldm
submit` writes into the script. With sbatch they are in the environment, if anywhere. Those of slurm/site.sh, and

    SCLDM_NOTES         folder for notes: state, history, preflight.json, bad_nodes. By default beside what is made
    SCLDM_PREFLIGHT     off leaves out the check of the nodes before the first rank starts
    SCLDM_PREFLIGHT_S   seconds that it may take, half of them until every rank is up
    SCLDM_STAGE         on copies the shards to each node's SCLDM_SCRATCH first
    SCLDM_MAX_FAILURES  how often in a row it may fail without progress. The last time it does not go back to the queue
    SCLDM_WARN_S        seconds before the time limit at which Slurm sends SIGUSR1
    SCLDM_STOP_SIGNAL   what tells the ranks to stop. By default the first of train.stop_signals that srun passes on
    SCLDM_MIN_NODES     the fewest nodes to run on, where preflight finds broken ones. By default all that it got

Reading order: main, JobSteps. StartedJob (job_end.py) is what they note, the signals they get, and how a job ends.
"""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, NoReturn

from launch.cluster import commands as slurm
from launch.cluster.containers import container_of
from launch.cluster.job_end import StartedJob
from launch.cluster.notes import BAD_NODES, CAME, IMAGE, REPORT, note_nodes
from launch.cluster.site import PASSED_ON, gpus_of_node
from scldm.environment import without_passwords
from scldm.errors import LOST, REFUSED, REQUEUE, STOPPED, InputError
from scldm.given_json import read_known

# of the shell that submitted, were they to come along: ranks are Slurm's here
NOT_FOR_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_DISTRIBUTION", "SCLDM_STAGED")
SIGKILLED = (128 + signal.SIGKILL, 253)  # 253: Slurm's word for just that
CRASHED = (signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV)
# on each node: removes a folder there once the job lets go of the step's stdin, or is gone
KEEPER = 'trap "" TERM USR1; echo here; cat >/dev/null; rm -rf "${1:?}"/* "$1"'
# in the container on each node, and beside it
HERE = "import os; print('here', os.environ['SLURMD_NODENAME'])"
LOAD = 'podman load --quiet --input="$1" && echo "here $SLURMD_NODENAME"'
NO_PROGRAM = (2, 126, 127)  # of srun, a shell or a container that finds no such command, or may not run it

TOO_LONG = 124  # exit code of a step that is ended for its time, as of `timeout`
END_S = 10  # seconds that such a step has to end in


def main(words: Sequence[str]) -> int:
    """The job of a verb's command line. Stdin names the signals that Slurm sends. Raises: SystemExit with its code, but
    for words that are refused."""
    for number in (signal.SIGUSR1, signal.SIGTERM):  # ignored until here. A step would inherit that
        signal.signal(number, lambda *_: None)
    try:
        job = StartedJob(settings_of(words), trains=words[0] == "train")
        steps = JobSteps(words, job)
    except InputError as error:
        print(f"scldm: error: {without_passwords(str(error))}", file=sys.stderr)
        return REFUSED
    try:
        steps.run()
    except InputError as error:
        job.fail(str(error))
    except Exception as error:
        traceback.print_exc()
        job.fail(f"{type(error).__name__}: {error}")


def settings_of(words: Sequence[str]) -> dict[str, str]:
    """The job's settings. Of one that was sent with sbatch, also what its words say. Raises: InputError."""
    given = {key: value for key, value in os.environ.items() if value}
    if "SCLDM_MADE" in given:
        return given
    from launch.cluster.job import settings_by_hand  # which reads the verb's config, with all its packages

    return settings_by_hand(words) | given


@dataclass(frozen=True)
class _Preflight:
    """What the job reads of preflight's report, which says more."""

    use: list[str]
    note: str


class JobSteps:
    """The steps of a job that has started, on its nodes.

    hosts: the nodes to run on
    env: what each step starts with
    """

    def __init__(self, words: Sequence[str], job: StartedJob) -> None:
        self.words, self.job, self.notes = list(words), job, job.notes
        self.settings = settings = job.settings
        self.image_s = int(settings.get("SCLDM_IMAGE_S") or 1_800)
        self.soft = settings["SCLDM_STOP_SIGNAL"]
        self.failure = self.notes / f"failure{self.job.part}"
        self.container = container_of(settings)
        self.hosts: list[str] = []
        self.env = {key: value for key, value in os.environ.items() if key not in NOT_FOR_RANKS}
        if settings.get("SCLDM_STAGE") == "on" and not settings.get("SCLDM_SHARDS"):
            raise InputError(f"SCLDM_STAGE=on: the ranks of {words[0]} read no shards that could be staged")
        if settings.get("SCLDM_STAGE") == "on" and not settings.get("SCLDM_SCRATCH"):
            raise InputError("SCLDM_STAGE=on needs SCLDM_SCRATCH, a folder on each node's own disk")

    def run(self) -> NoReturn:
        self.begin()
        self.set_up()
        self.image()
        if self.settings["SCLDM_RANKS"] == "all" and self.settings["SCLDM_PREFLIGHT"] != "off":
            self.hosts = self.preflight()
        if self.settings.get("SCLDM_STAGE") == "on":
            self.stage()
        self.verb()

    # --- the steps --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Note the start."""
        self.notes.mkdir(parents=True, exist_ok=True)
        now = self.job.progress()
        self.job.note_progress("start", now)
        where = f"at {now}, on {self.settings['SLURM_JOB_NODELIST']}"
        self.what = f"{without_passwords(' '.join(self.words))} (start {self.job.restart + 1}, {where})"
        self.job.note("RUNNING", self.what)

    def set_up(self) -> None:
        """What every step starts with."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        # srun hands it on: the first rank's store holds a few connections of every rank
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        passed_on = {key[6:]: value for key, value in self.settings.items() if key.startswith(PASSED_ON)}
        named = {key: self.settings[key] for key in ("SCLDM_NOTES", "SCLDM_PREFLIGHT_S")}
        self.env |= passed_on | named | {"SCLDM_FAILURE": str(self.failure), "PYTHONUNBUFFERED": "1"}
        self.env.setdefault("OMP_NUM_THREADS", "1")
        # jobs that share a node must not share a port. It lies below Linux's ephemeral ones
        self.env["MASTER_PORT"] = str(12_000 + int(self.job.id) % 20_000)
        self.hosts = slurm.call("scontrol", "show", "hostnames", self.settings["SLURM_JOB_NODELIST"]).split()
        if self.settings["SCLDM_RANKS"] != "all":
            self.hosts = self.hosts[:1]

    def image(self) -> None:
        """Bring the container's image to each node. It is no part of preflight: a slow copy is no node that hangs."""
        if self.container is None:
            return
        began, told = time.monotonic(), f"image {self.container.image} ({self.container.runtime})"
        self.job.note("RUNNING", f"{self.what}. It brings {told} to {len(self.hosts)} nodes")
        if self.container.is_archive:
            loaded = self.bring(told, "podman did not load it", "bash", "-c", LOAD, "load", self.container.image)
            if not (names := re.findall(r"^Loaded image.*: (\S+)$", loaded, re.MULTILINE)):
                self.job.fail(f"{told}: podman load printed no image's name. See {self.notes / IMAGE}{self.job.part}")
            self.container = self.container._replace(image=names[-1])
        python = self.settings["SCLDM_PYTHON"]
        self.bring(told, f"{python} did not start in it", *self.python("-c", HERE))
        self.job.note("RUNNING", f"{self.what}. {told} is there after {time.monotonic() - began:.0f} s")

    def bring(self, told: str, failed: str, *words: str) -> str:
        """Run a command once on every node, in the container or beside it, and go on with the nodes that say `here`.

        A node that says nothing within SCLDM_IMAGE_S is left out as one that fails. Returns what the command prints.

        Raises: SystemExit where too few nodes are left. A registry that is away for a moment is tried again.
        """
        place = self.notes / f"{IMAGE}{self.job.part}"
        with place.open("w") as file:
            # a node that fails ends no other, so that all are named
            command = [*self.each_node(), "--kill-on-bad-exit=0", "--wait=0", *words]
            code = self.step("TERM", command, stdout=file, within_s=self.image_s or math.inf)
        if self.told_to_stop(code):
            self.job.requeue("while the container's image came")
        printed = place.read_text()
        came = re.findall(r"^here (\S+)$", printed, re.MULTILINE)
        if missing := [host for host in self.hosts if host not in came]:
            late = f" within {self.image_s} s (SCLDM_IMAGE_S)" if code == TOO_LONG else ""
            why = f"{told}: {failed} on {', '.join(missing)}{late}. See the log"
            self.job.heed(why)
            if came:  # what all nodes meet alike is the fault of the job or of the site file
                note_nodes(self.notes / BAD_NODES, dict.fromkeys(missing, f"{told}: {failed}{late}"))
            elif code in NO_PROGRAM:
                self.job.fail(f"{why}: exit code {code}, no such program")
            if len(came) < int(self.settings.get("SCLDM_MIN_NODES") or len(self.hosts)):
                self.job.retry(why)
            self.hosts = [host for host in self.hosts if host in came]
        return printed

    def preflight(self) -> list[str]:
        """The nodes to run on. Raises: SystemExit where there are none."""
        shutil.rmtree(self.notes / CAME, ignore_errors=True)
        report = self.notes / REPORT
        report.unlink(missing_ok=True)
        # a rank that dies or fails must not end the others, which would be blamed for it. All end within its time
        wait_s = int(self.settings["SCLDM_PREFLIGHT_S"]) + 5
        command = [*self.ranks(), "--kill-on-bad-exit=0", f"--wait={wait_s}"]
        command += self.python("-m", "launch.cluster.preflight", *self.words)
        code = self.step("TERM", command, TORCH_CPP_LOG_LEVEL="ERROR")
        if self.told_to_stop(code):
            self.job.requeue("during preflight")
        if not report.exists():
            self.job.heed(f"preflight, exit code {code}")
            # the first rank reports on all. Every rank that comes up leaves word, also where it can't reach the first
            if not list(self.notes.glob(f"{CAME}/*")):
                self.job.fail(f"preflight, exit code {code}: no rank came up on any node. See the log")
            if len(self.hosts) > 1:  # of a single node, it may be the job
                note_nodes(self.notes / BAD_NODES, {self.hosts[0]: "its first rank gave no report in preflight"})
            self.job.fail(f"preflight, exit code {code}: the first rank, on {self.hosts[0]}, gave no report")
        told = read_known(_Preflight, report)
        if not told.use:
            see = f"{told.note}. See" if told.note else "see"
            self.job.fail(f"preflight: {see} {REPORT} and {BAD_NODES} in {self.notes}")
        return told.use

    def stage(self) -> None:
        """Copy the shards. The ranks read the copies, but what they note of the run names the set itself."""
        source, staged = self.settings["SCLDM_SHARDS"], f"{self.settings['SCLDM_SCRATCH']}/scldm-{self.job.id}"
        running = ",".join(slurm.call("squeue", "--me", "--noheader", "--format=%A").split())
        if not self.keep(staged):
            self.job.listen()
            if self.job.stopping:
                self.job.requeue("before shards were staged")
            self.job.fail(
                f"staging: the step that removes what is staged did not start on all of {len(self.hosts)} nodes"
            )
        command = [*self.each_node(), *self.python("-m", "launch.cluster.copy_shards")]
        code = self.step("TERM", [*command, f"source={source}", f"out={staged}", f"running={running}"])
        if self.told_to_stop(code):
            self.job.requeue("while shards were staged")
        if code:
            self.job.fail(f"staging {source}, exit code {code}", code)
        self.env["SCLDM_STAGED"] = staged

    def verb(self) -> NoReturn:
        """Run the verb's ranks, and conclude from their exit code."""
        words = list(self.words)
        if self.job.part:
            first, n = int(self.settings.get("SLURM_ARRAY_TASK_MIN", 0)), self.settings.get("SLURM_ARRAY_TASK_COUNT", 1)
            words.append(f"task={int(self.settings['SLURM_ARRAY_TASK_ID']) - first}/{n}")
        self.failure.unlink(missing_ok=True)
        code = self.step(self.soft, [*self.ranks(), *self.python("-m", "launch.cli", *words)])
        told = self.told_to_stop(code)
        if failed := self.failed(code):
            self.job.fail(f"exit code {failed[0]}{': ' if failed[1] else ''}{failed[1]}", failed[0])
        if code == 0:
            self.job.end(0, "DONE")
        if code == STOPPED:
            self.job.end(code, "STOPPED", f"by the file stop in {self.job.made}")
        if code == REQUEUE or (told and code > 128):
            self.job.requeue()
        # no exception: the kernel or a library ended a rank, which another start may be spared
        if code == LOST:
            self.job.retry("a rank that is gone or hangs")
        if code in SIGKILLED:
            self.job.retry("a rank killed by SIGKILL, as where memory is used up")
        if code - 128 in CRASHED:
            self.job.retry(f"a rank killed by {signal.Signals(code - 128).name}")
        self.job.fail(f"exit code {code}", code)

    def failed(self, code: int) -> tuple[int, str] | None:
        """The exit code and the error of the first rank that failed by an exception, where one left word of it.

        Of most verbs, srun ends the other ranks by signals, and returns those. Of a training it ends none: there a rank
        that died by a signal is what makes the others fail.
        """
        ended_by_srun = code in (128 + signal.SIGKILL, 128 + signal.SIGTERM) and not self.job.trains
        if self.job.stopping or not (code in (1, REFUSED) or ended_by_srun):
            return None
        for look in range(5 if ended_by_srun else 1):  # on a network file system it may show up a moment later
            if look:
                time.sleep(0.5)
            os.listdir(self.notes)
            if self.failure.exists():
                told, _, why = self.failure.read_text(errors="replace").partition("\t")
                return int(told.strip() or 1), why
        return None

    # --- how a step is run ------------------------------------------------------------------------------------------

    def step(
        self,
        signal_name: str,
        command: Sequence[str],
        stdout: IO[str] | None = None,
        within_s: float = math.inf,
        **more_env: str,
    ) -> int:
        """Run a step. It is sent the signal when the job is told to stop. Returns its exit code as a shell has it, or
        TOO_LONG where it took longer than `within_s`."""
        end = time.monotonic() + within_s
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, env=self.env | more_env)
        while True:
            self.job.listen()
            if self.job.unheard:
                self.job.unheard = False
                self.job.say(f"told to stop: sending SIG{signal_name} to the ranks")
                self.wait_for_step(process)
                process.send_signal(signal.Signals[f"SIG{signal_name}"])
            if process.poll() is not None:
                return process.returncode if process.returncode >= 0 else 128 - process.returncode
            if time.monotonic() > end:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END_S)
                process.kill()  # srun waits for a node that hangs
                process.wait()
                return TOO_LONG
            self.job.listen(0.1)

    def wait_for_step(self, process: subprocess.Popen[bytes]) -> None:
        """Until Slurm has the step: an srun that has only begun does not pass a signal on."""
        for _ in range(60):
            told = ""
            with suppress(InputError):
                told = slurm.call("squeue", "--noheader", "--steps", f"--jobs={self.job.id}", "--format=%i")
            if len(re.findall(r"\.\d+$", told, re.MULTILINE)) > bool(self.job.keeper):
                break
            time.sleep(1)
            if process.poll() is not None:
                return
        time.sleep(1)

    def told_to_stop(self, code: int) -> bool:
        """Whether a signal came to the script, or to a step's ranks before they catch it, as its exit code tells."""
        self.job.listen()
        soft = (signal.SIGUSR1, signal.SIGTERM, signal.Signals[f"SIG{self.soft}"])
        return self.job.stopping or code - 128 in soft

    def ranks(self) -> list[str]:
        """srun, with its arguments for every rank."""
        per_node = 1
        if self.settings["SCLDM_RANKS"] == "all":
            without = self.settings.get("SCLDM_TASKS_PER_NODE") or self.settings.get("SLURM_NTASKS_PER_NODE") or 1
            per_node = gpus_of_node(self.settings)[1] or int(without)
        # In a training run, a rank that ends early must not take the others' last save with it, and they must not wait
        # for it for ever. In the other verbs all end with one that failed, and the first may take its time to join what
        # all made.
        common = ["--kill-on-bad-exit=0", "--wait=120"] if self.job.trains else ["--kill-on-bad-exit=1", "--wait=0"]
        # Ranks stand in the order of `hosts`, as preflight names nodes by rank. On a node they stand in the order of
        # its sockets, as its GPUs mostly do. Slurm's own order puts every other rank on a socket away from its GPU.
        common += ["--cpu-bind=cores", "--distribution=block:block", "--label"]  # each line with its rank
        if cpus := self.settings.get("SCLDM_CPUS_PER_TASK"):
            common.append(f"--cpus-per-task={cpus}")
        return ["srun", *common, *self.on_hosts(per_node)]

    def each_node(self) -> list[str]:
        """srun, with its arguments for one task on every node."""
        return ["srun", "--overlap", *self.on_hosts(1)]

    def on_hosts(self, per_node: int) -> list[str]:
        address = self.hosts[0] if len(self.hosts) > 1 else "127.0.0.1"  # where nobody from elsewhere comes
        self.env |= {"MASTER_ADDR": address, "SCLDM_HOSTS": " ".join(self.hosts)}
        n = len(self.hosts)
        place = [f"--nodelist={','.join(self.hosts)}", f"--nodes={n}"]
        return [*place, f"--ntasks={n * per_node}", f"--ntasks-per-node={per_node}"]

    def python(self, *words: str) -> list[str]:
        """The ranks' Python, in the site's container where there is one. It stands after srun's arguments."""
        # not of the start before: pyxis may have left half of it there
        name, gpus = f"scldm-{self.job.id}-{self.job.restart}", int(self.settings.get("SLURM_GPUS_ON_NODE") or 0) > 0
        within = self.container.before_python(name, gpus) if self.container else []
        return [*within, self.settings["SCLDM_PYTHON"], "-P", *words]

    # --- what is staged goes away with the job ----------------------------------------------------------------------

    def keep(self, folder: str) -> bool:
        """Start a step on each node that removes the folder there once this process lets go of it, or is gone.

        It is there before the folder is: for a job that Slurm ends, it starts no step any more. False where it does not
        come.
        """
        here = self.notes / f"keepers{self.job.part}"  # of this node's srun alone, which is told by all
        with here.open("w") as file:
            command = [*self.each_node(), "bash", "-c", KEEPER, "keeper", folder]
            self.job.keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, env=self.env)
        for _ in range(600):
            if here.read_text().split().count("here") == len(self.hosts):
                return True
            if self.job.keeper.poll() is not None:
                break
            time.sleep(0.1)
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
