"""A job's steps in a container: with stand-ins for Slurm, pyxis, Apptainer and Podman, which note what they do.

tests/slurm/test_podman.py has a real Podman.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch.cluster.containers import PODMAN_OPTIONS, RUNTIMES, Container, container_of
from scldm.errors import InputError
from tests.launch.test_job_script import Life

MOUNTS = "/lu+re,/data:/cells:ro,/x:/x:ro+rprivate"


def words(runtime: str, gpus: bool, mounts: str = MOUNTS) -> list[str]:
    site = {"SCLDM_CONTAINER": "an image", "SCLDM_CONTAINER_RUNTIME": runtime, "SCLDM_CONTAINER_MOUNTS": mounts}
    container = container_of(site)
    assert container
    return container.before_python("scldm-7-0", gpus)


@pytest.mark.parametrize("runtime", ["", "pyxis"])
def test_pyxis_takes_options_of_srun(runtime: str) -> None:
    mounts = "--container-mounts=/lu+re:/lu+re,/data:/cells:ro,/x:/x:ro+rprivate"
    named = ["--container-image=an image", "--container-name=scldm-7-0"]
    assert words(runtime, True) == words(runtime, False) == [*named, mounts]
    assert words(runtime, True, "") == named
    assert words(runtime, True, "tmpfs:/x") == [*named, "--container-mounts=tmpfs:/x"]


@pytest.mark.parametrize("runtime", ["apptainer", "singularity"])
def test_apptainer_runs_each_rank(runtime: str) -> None:
    binds = ["--bind=/lu+re:/lu+re", "--bind=/data:/cells:ro", "--bind=/x:/x:ro,rprivate"]
    assert words(runtime, True) == [runtime, "exec", "--nv", *binds, "an image"]
    assert words(runtime, False) == [runtime, "exec", *binds, "an image"]


def test_podman_runs_each_rank() -> None:
    binds = ["--volume=/lu+re:/lu+re", "--volume=/data:/cells:ro", "--volume=/x:/x:ro,rprivate"]
    *shell, name = words("podman", True)[:4]
    assert shell[:2] == ["bash", "-c"]
    assert name == "podman"
    assert words("podman", True)[4:] == [*PODMAN_OPTIONS, "--device=nvidia.com/gpu=all", *binds, "an image"]
    assert words("podman", False)[4:] == [*PODMAN_OPTIONS, *binds, "an image"]


@pytest.mark.parametrize("runtime, word", [("pyxis", "--container-workdir"), ("podman", "--workdir")])
def test_a_folder_that_is_mounted_is_that_of_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, word: str
) -> None:
    """So that words may name files as seen from it."""
    monkeypatch.chdir(tmp_path)
    assert f"{word}={tmp_path}" in words(runtime, False, str(tmp_path.parent))
    assert not [found for found in words(runtime, False, f"{tmp_path.parent}:/elsewhere") if found.startswith(word)]


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("_RUNTIME", "docker", "SCLDM_CONTAINER_RUNTIME=docker: give one of pyxis, apptainer, singularity, podman"),
        ("_MOUNTS", "/a,b:/c", "SCLDM_CONTAINER_MOUNTS: 'b:/c' is no mount of podman. Give /data, /data:/inside or "),
        ("_MOUNTS", "/a:b", "'/a:b' is no mount of podman"),
        ("_MOUNTS", "/a:/b:ro,rw", "'rw' is no mount of podman"),
        ("", "", "SCLDM_CONTAINER_RUNTIME=podman needs SCLDM_CONTAINER, an image"),
    ],
)
def test_what_a_site_can_not_say(key: str, value: str, said: str) -> None:
    site = {"SCLDM_CONTAINER": "image", "SCLDM_CONTAINER_RUNTIME": "podman", f"SCLDM_CONTAINER{key}": value}
    with pytest.raises(InputError) as error:
        container_of(site)
    assert said in str(error.value)


def test_a_site_may_have_no_container() -> None:
    assert container_of({"SCLDM_CONTAINER": "", "SCLDM_CONTAINER_RUNTIME": ""}) is None
    assert container_of({"SCLDM_CONTAINER": "image"}) == Container("pyxis", "image", [])


# --- jobs ------------------------------------------------------------------------------------------------------------

# srun: the command once on each node. With pyxis it unpacks an image that has no container of that name there
SRUN = """#!/bin/bash
name=none
while [[ $1 == -* ]]; do
    case $1 in
        --nodelist=*) hosts=${1#*=} ;;
        --container-image=*) image=${1#*=} ;;
        --container-name=*) name=${1#*=} ;;
    esac
    shift
done
case "$*" in *keeper*) echo here here; exec cat ;; esac
for host in ${hosts//,/ }; do
    if [ -n "$image" ] && [ ! -e "$FAKE/$host-$name" ]; then
        echo "unpack $image as $name on $host" >>"$FAKE/did"
        if [ "$host" = "$(cat "$FAKE/broken" 2>/dev/null)" ]; then code=1; continue; fi
        if [ "$host" = "$(cat "$FAKE/hangs" 2>/dev/null)" ]; then hangs=1; continue; fi
        touch "$FAKE/$host-$name"
    fi
    SLURMD_NODENAME=$host IN=${image:+pyxis} "$@" || code=$?
done
if [ -n "$hangs" ]; then
    [ ! -e "$FAKE/deaf" ] || trap "" TERM
    exec sleep 60
fi
exit ${code:-0}
"""
# a command that runs another in a container, and hands signals on
RUNTIME = """#!/bin/bash
echo "${0##*/} $*" >>"$FAKE/commands"
[ "$1" != load ] || { echo "Loaded image: localhost/its-name:1"; exit; }
[ "$SLURMD_NODENAME" != "$(cat "$FAKE/broken" 2>/dev/null)" ] || exit 125
while [ "$1" != "$FAKE/rank's python" ]; do shift; done
export IN="${0##*/}"
exec "$@"
"""
# the ranks' Python: it is asked whether it is there, checks nodes, copies shards, or runs the verb
PYTHON = """#!/bin/bash
case "$*" in
    *" -c "*) exec "$REAL" -S "$@" ;;
    *preflight*) did=preflight; nodes=$(sed 's/ /", "/g' <<<"$SCLDM_HOSTS")
        echo "{\\"use\\": [\\"$nodes\\"], \\"note\\": \\"\\"}" >"$SCLDM_NOTES/preflight.json" ;;
    *copy_shards*) did=stage ;;
    *) did=verb ;;
esac
echo "$did in $IN on $SLURMD_NODENAME" >>"$FAKE/did"
if [ $did = verb ]; then . "$FAKE/rank"; fi
"""


class Site:
    """Of two nodes, with a container."""

    def __init__(self, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake, self.tmp_path = fake, tmp_path
        monkeypatch.setenv("REAL", sys.executable)
        texts = {"bin/srun": SRUN, "rank's python": PYTHON, **{f"bin/{name}": RUNTIME for name in RUNTIMES[1:]}}
        for name, text in texts.items():
            (fake / name).write_text(text)
            (fake / name).chmod(0o755)
        (fake / "rank").write_text("exit 0")

    def job(self, runtime: str, image: str = "scldm.sqsh", *options: str) -> Life:
        lines = {"": image, "_RUNTIME": runtime, "_MOUNTS": self.tmp_path}
        with (self.tmp_path / "site.sh").open("a") as file:
            file.writelines(f'SCLDM_CONTAINER{key}="{value}"\n' for key, value in lines.items())
            file.write(f'SCLDM_PYTHON="{self.fake}/rank\'s python"\nSCLDM_SCRATCH="{self.tmp_path}/disk"\n')
        return Life(self.fake, self.tmp_path, "--preflight", "true", "--nodes", "2", *options)

    def did(self) -> list[str]:
        return (self.fake / "did").read_text().splitlines()


@pytest.fixture
def site(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(fake, tmp_path, monkeypatch)


@pytest.mark.heavy
def test_pyxis_unpacks_once_for_all_steps_and_before_preflight(site: Site) -> None:
    life = site.job("pyxis", "scldm.sqsh", "--stage")
    (site.fake / "rank").write_text("exit 85")
    assert life.start(0, step=5) == "REQUEUED", life.done.stdout + life.done.stderr
    steps = [f"{did} in pyxis on {host}" for did in ("preflight", "stage", "verb") for host in ("n1", "n2")]
    assert site.did() == [*(f"unpack scldm.sqsh as scldm-7-0 on {host}" for host in ("n1", "n2")), *steps]
    assert "brings image scldm.sqsh (pyxis) to 2 nodes" in life.done.stdout
    assert "image scldm.sqsh (pyxis) is there after " in life.done.stdout
    (site.fake / "did").unlink()
    assert life.start(1, step=6) == "REQUEUED"  # a node may have kept half of what it unpacked
    assert site.did()[0] == "unpack scldm.sqsh as scldm-7-1 on n1"


@pytest.mark.heavy
@pytest.mark.parametrize("runtime", RUNTIMES[1:])
def test_ranks_in_a_container_have_their_environment_signals_and_exit_codes(
    site: Site, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    life = site.job(runtime)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    script = 'echo "$MASTER_ADDR" >"$FAKE/told"; trap "exit 85" USR1; touch "$FAKE/step"; kill -USR1 $SCRIPT; '
    (site.fake / "rank").write_text(script + "for ((k = 0; k < 80; k++)); do sleep 0.1; done")
    # srun hands signals on to what it runs
    srun = SRUN.replace('"$@" || code=$?', '"$@" & trap "kill -USR1 $!" USR1; wait $!; wait $!; code=$?')
    (site.fake / "bin" / "srun").write_text(srun)
    assert life.start(0, step=5, hosts="n1") == "REQUEUED", life.done.stdout + life.done.stderr
    assert (site.fake / "told").read_text() == "127.0.0.1\n"  # nobody else may come
    assert site.did() == [f"preflight in {runtime} on n1", f"verb in {runtime} on n1"]
    image, preflight, verb = (site.fake / "commands").read_text().splitlines()
    gpus = " --device=nvidia.com/gpu=all " if runtime == "podman" else " --nv "
    for line, program in (
        (image, "-P -c import"),
        (preflight, "-P -m launch.cluster.preflight"),
        (verb, "-P -m launch.cli"),
    ):
        assert gpus in line
        assert f" scldm.sqsh {site.fake}/rank's python {program}" in line


@pytest.mark.heavy
def test_podman_is_given_the_environment_but_the_hosts_search_paths(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/lib")
    life = site.job("podman")
    assert life.start(0, step=5) == "DONE", life.done.stdout + life.done.stderr
    given = {word for word in (site.fake / "commands").read_text().split() if word.startswith("--env=")}
    assert {"--env=MASTER_ADDR", "--env=SLURMD_NODENAME", "--env=SCLDM_NOTES", "--env=HOME"} <= given
    assert not {"--env=PATH", "--env=LD_LIBRARY_PATH"} & given


@pytest.mark.heavy
def test_podman_loads_an_archive_on_each_node(site: Site) -> None:
    life = site.job("podman", "/images/scldm.tar")
    assert life.start(0, step=5) == "DONE", life.done.stdout + life.done.stderr
    lines = (site.fake / "commands").read_text().splitlines()
    assert lines[:2] == ["podman load --quiet --input=/images/scldm.tar"] * 2
    assert len(lines) == 8
    assert all(" localhost/its-name:1 " in line and ".tar" not in line for line in lines[2:])


@pytest.mark.heavy
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_node_that_an_image_does_not_come_to_is_named(site: Site, runtime: str) -> None:
    """A registry may be away for a moment, so the job is tried again, and not for ever."""
    life = site.job(runtime, "scldm.sqsh", "--max-failures", "2")
    (site.fake / "broken").write_text("n2")
    assert life.start(0, step=5) == "REQUEUED"
    why = f"image scldm.sqsh ({runtime}): {site.fake}/rank's python did not start in it on n2. See the log"
    assert (life.notes / "state").read_text().endswith(f"\tby {why}, at 5\n")
    assert (life.notes / "bad_nodes").read_text().startswith("n2\t")
    (life.notes / "bad_nodes").unlink()
    assert life.start(1, step=5, hosts="n2") == "FAILED"  # no other node has it
    assert (
        (life.notes / "state").read_text().endswith(f"\tstopped by {why}: 2 failures without progress (still at 5)\n")
    )
    assert life.requeued == 1
    assert not (life.notes / "bad_nodes").exists()
    assert not (site.fake / "did").exists() or all(line.startswith("unpack") for line in site.did())


@pytest.mark.heavy
def test_an_image_that_comes_the_second_time_is_no_failure(site: Site) -> None:
    life = site.job("pyxis")
    (site.fake / "broken").write_text("n2")
    assert life.start(0, step=0) == "REQUEUED"
    (site.fake / "broken").unlink()
    assert life.start(1, step=0) == "DONE", life.done.stdout + life.done.stderr
    assert [line for line in site.did() if line.startswith("verb")] == ["verb in pyxis on n1", "verb in pyxis on n2"]


@pytest.mark.heavy
@pytest.mark.parametrize("code, state", [(127, "FAILED"), (126, "FAILED"), (2, "FAILED"), (125, "REQUEUED")])
def test_a_runtime_that_is_on_no_node_is_not_tried_again(site: Site, code: int, state: str) -> None:
    """127 of a shell that finds no such command. 125 of Podman, also where a registry gives no answer."""
    life = site.job("podman")
    (site.fake / "bin" / "podman").write_text(f"#!/bin/sh\nexit {code}\n")
    assert life.start(0, step=5) == state
    assert life.requeued == (state == "REQUEUED")
    assert not (life.notes / "bad_nodes").exists()
    if state == "FAILED":
        assert f"did not start in it on n1, n2. See the log: exit code {code}, no such program" in life.done.stdout


@pytest.mark.heavy
def test_a_runtime_that_some_nodes_have_is_tried_again(site: Site) -> None:
    life = site.job("apptainer")
    (site.fake / "broken").write_text("n2")
    (site.fake / "bin" / "apptainer").write_text(RUNTIME.replace("exit 125", "exit 127"))
    assert life.start(0, step=5) == "REQUEUED", life.done.stdout + life.done.stderr
    assert (life.notes / "bad_nodes").read_text().startswith("n2\t")


@pytest.mark.heavy
@pytest.mark.parametrize("least, state", [("1-2", "DONE"), ("2", "REQUEUED")])
def test_a_node_that_hangs_while_its_image_comes_is_named_and_left_out(site: Site, least: str, state: str) -> None:
    with (site.tmp_path / "site.sh").open("a") as file:
        file.write("SCLDM_IMAGE_S=1\n")
    life = site.job("pyxis", "scldm.sqsh", "--nodes", least)
    (site.fake / "hangs").write_text("n2")
    if state == "DONE":
        (site.fake / "deaf").touch()  # as srun, which waits for the node after SIGTERM too
    assert life.start(0, step=5) == state, life.done.stdout + life.done.stderr
    why = f"image scldm.sqsh (pyxis): {site.fake}/rank's python did not start in it"
    assert (life.notes / "bad_nodes").read_text().endswith(f"\t{why} within 1 s (SCLDM_IMAGE_S)\n")
    assert [line for line in site.did() if line.startswith("verb")] == ["verb in pyxis on n1"] * (state == "DONE")
    if state == "REQUEUED":
        assert f"by {why} on n2 within 1 s (SCLDM_IMAGE_S). See the log, at 5" in life.done.stdout


@pytest.mark.heavy
def test_a_node_that_hangs_while_it_loads_an_archive_is_left_out(site: Site) -> None:
    with (site.tmp_path / "site.sh").open("a") as file:
        file.write("SCLDM_IMAGE_S=1\n")
    life = site.job("podman", "/images/scldm.tar", "--nodes", "1-2")
    hangs = '[ "$1.$SLURMD_NODENAME" != load.n2 ] || exec sleep 60\n'
    (site.fake / "bin" / "srun").write_text(SRUN.replace('"$@" ||', '"$@" 2>/dev/null ||'))  # what outlives it
    (site.fake / "bin" / "podman").write_text(RUNTIME.replace("echo", hangs + "echo", 1))
    assert life.start(0, step=5) == "DONE", life.done.stdout + life.done.stderr
    why = "image /images/scldm.tar (podman): podman did not load it within 1 s (SCLDM_IMAGE_S)"
    assert (life.notes / "bad_nodes").read_text().startswith("n2\t")
    assert why in (life.notes / "bad_nodes").read_text()
    assert all("on n1" in line for line in site.did())


@pytest.mark.heavy
def test_the_job_goes_on_without_it_where_fewer_nodes_will_do(site: Site) -> None:
    life = site.job("pyxis", "scldm.sqsh", "--nodes", "1-2")
    (site.fake / "broken").write_text("n2")
    assert life.start(0, step=5) == "DONE", life.done.stdout + life.done.stderr
    assert (life.notes / "bad_nodes").read_text().startswith("n2\t")
    assert [line for line in site.did() if line.startswith("verb")] == ["verb in pyxis on n1"]


@pytest.mark.heavy
def test_a_signal_while_an_image_comes_sends_the_job_back(site: Site) -> None:
    life = site.job("apptainer")
    script = '#!/bin/bash\ntrap "exit 143" TERM; touch "$FAKE/step"; kill -USR1 $SCRIPT; '
    (site.fake / "bin" / "apptainer").write_text(script + "for ((k = 0; k < 80; k++)); do sleep 0.1; done")
    srun = SRUN.replace('"$@" || code=$?', 'exec "$@"')
    (site.fake / "bin" / "srun").write_text(srun)
    assert life.start(0, step=5, hosts="n1") == "REQUEUED"
    assert "by a signal while the container's image came" in (life.notes / "state").read_text()
