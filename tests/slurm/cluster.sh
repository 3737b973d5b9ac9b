#!/usr/bin/env bash
# A real Slurm of a few nodes on this host, for tests: controller, munge and one slurmd a node, on the loopback.
#   cluster.sh install           Debian's packages (root)
#   cluster.sh why-not           one line that says what is missing here; nothing where it can run
#   cluster.sh start FOLDER N    start nodes sim1 ... simN; everything they write lies in FOLDER
#   cluster.sh crash FOLDER K    simK loses its power: all its processes die at once
#   cluster.sh revive FOLDER K
#   cluster.sh stop FOLDER
# Clients need SLURM_CONF=FOLDER/slurm.conf. A node has its own host name, its own FOLDER/disk (its local disk; to all
# others that folder is empty), its own /etc/hosts, and two pretended GPUs that are counted and not there. Partitions:
# `low`, whose jobs go back to the queue for those of `high` after 20 s.
set -euo pipefail

PACKAGES=(slurmctld slurmd slurm-client munge)
export PATH=$PATH:/usr/sbin:/sbin

fail() { echo "cluster.sh: $*" >&2; exit 1; }

install() {
    [ "$(id -u)" = 0 ] || fail "installing takes root"
    command -v apt-get >/dev/null || fail "there is no apt-get here"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq install -y --no-install-recommends "${PACKAGES[@]}" >/dev/null
}

why_not() {
    local program
    for program in slurmctld slurmd munged sbatch unshare; do
        command -v "$program" >/dev/null || { echo "$program is not installed (tests/slurm/cluster.sh install)"; return; }
    done
    [ "$(id -u)" = 0 ] || { echo "starting Slurm's daemons takes root"; return; }
    unshare --uts --mount true 2>/dev/null || echo "this host gives no name spaces to its nodes"
}

free_ports() { # COUNT: a row of ports that nobody listens on; prints the first
    python3 - "$1" <<'PYTHON'
import random, socket, sys

count = int(sys.argv[1])
while True:
    first = random.randrange(20_000, 32_000 - count)
    try:
        held = [socket.create_server(("127.0.0.1", first + k)) for k in range(count)]
    except OSError:
        continue
    print(first)
    break
PYTHON
}

configure() { # FOLDER N
    local folder=$1 n=$2 port k memory
    port=$(free_ports $((n + 1)))
    memory=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) * 9 / 10240))
    cat >"$folder/slurm.conf" <<CONF
ClusterName=sim
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for cred_expire, 120 s by default; less than 5 s is not taken
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CryptoType=crypto/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=3
MinJobAge=600
# a job's ports follow from its number: the first jobs of two such Slurms on a host would want the same ones
FirstJobId=$((RANDOM % 8000 + 1))
SlurmctldTimeout=10
SlurmdTimeout=8
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
CompleteWait=0
InactiveLimit=0
OverTimeLimit=0
PropagateResourceLimits=NONE
GresTypes=gpu
CONF
    : >"$folder/gpu0"
    : >"$folder/gpu1"
    cp /etc/hosts "$folder/hosts"
    : >"$folder/gres.conf"
    for ((k = 1; k <= n; k++)); do
        echo "127.0.0.1 sim$k" >>"$folder/hosts"
        echo "NodeName=sim$k Name=gpu File=$folder/gpu[0-1] Flags=nvidia_gpu_env" >>"$folder/gres.conf"
        echo "NodeName=sim$k NodeHostname=sim$k NodeAddr=127.0.0.1 Port=$((port + k)) CPUs=2 RealMemory=$memory Gres=gpu:2" >>"$folder/slurm.conf"
    done
    cat >>"$folder/slurm.conf" <<CONF
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL State=UP PriorityTier=9 PreemptMode=OFF
CONF
}

start_node() { # FOLDER K
    local folder=$1 name=sim$2
    mkdir -p "$folder/spool/$name" "$folder/disks/$name"
    # shellcheck disable=SC2016 # the inner shell expands these
    SLURM_CONF=$folder/slurm.conf unshare --uts --mount -- sh -c '
        mount --bind "$1/hosts" /etc/hosts && mount --bind "$1/disks/$2" "$1/disk" && hostname "$2" && exec slurmd -N "$2"
    ' sh "$folder" "$name" </dev/null >"$folder/$name.out" 2>&1 || fail "$name: $(tail -n 3 "$folder/$name.out")"
}

start() { # FOLDER N
    local folder n=$2 up
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    case $folder in *[[:space:]]*) fail "Slurm's own configuration takes no path with spaces: $folder" ;; esac
    mkdir -p "$folder"/{state,spool,disks,disk}
    configure "$folder" "$n"
    (umask 077 && head -c 256 /dev/urandom >"$folder/munge.key")
    munged --force --num-threads=2 --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" \
        >"$folder/munged.out" 2>&1 || fail "munged: $(cat "$folder/munged.out")"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -i </dev/null >"$folder/slurmctld.out" 2>&1 || fail "slurmctld: $(cat "$folder/slurmctld.out")"
    for ((k = 1; k <= n; k++)); do start_node "$folder" "$k"; done
    for ((k = 0; k < 150; k++)); do
        up=$(timeout 5 sinfo -h -N -p low -o %T 2>/dev/null | grep -c '^idle$' || true)
        if [ "$up" = "$n" ]; then return; fi
        sleep 0.2
    done
    fail "only $up of $n nodes came up: $(tail -n 3 "$folder/slurmctld.log")"
}

processes_of() { # FOLDER K: what runs in the name space of a node
    local pid space
    pid=$(cat "$1/sim$2.pid" 2>/dev/null) || return 0
    space=$(readlink "/proc/$pid/ns/uts") || return 0
    if [ "$space" = "$(readlink /proc/self/ns/uts)" ]; then return 0; fi # another process has taken the number
    for pid in /proc/[0-9]*; do
        if [ "$(readlink "$pid/ns/uts" 2>/dev/null)" = "$space" ]; then echo "${pid#/proc/}"; fi
    done
}

crash() { # FOLDER K
    local pids
    mapfile -t pids < <(processes_of "$1" "$2")
    if [ ${#pids[@]} -gt 0 ]; then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
}

stop() { # FOLDER
    local folder=$1 file pid name
    for file in "$folder"/disks/*; do
        name=${file##*/}
        crash "$folder" "${name#sim}"
    done
    for name in slurmctld munged; do
        pid=$(cat "$folder/$name.pid" 2>/dev/null) || continue
        if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$name" ]; then kill -KILL "$pid"; fi
    done
}

case ${1:-} in
    install) install ;;
    why-not) why_not ;;
    start) start "$2" "$3" ;;
    crash) crash "$2" "$3" ;;
    revive) start_node "$2" "$3" ;;
    stop) stop "$2" ;;
    *) sed -n '2,11p' "$0"; exit 2 ;;
esac
