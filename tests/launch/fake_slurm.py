"""Stand-ins for Slurm's commands, which note what they were asked, and a command line of training to submit."""

from __future__ import annotations

from pathlib import Path

SBATCH = '#!/bin/bash\necho "$@" >>"$FAKE/sbatch"; echo $((100 + $(wc -l <"$FAKE/sbatch")))\n'
SINFO = """#!/bin/bash
printf "low*|%s|100|gpu:h100:8(S:0-1)\\n" n1 n2 n3 n4
printf "low*|%s|100|gpu:h100:8(S:0-1)\\n" n7 n8
printf "low*|%s|64|gpu:4\\n" n5 n6
printf "cpu|%s|16|(null)\\n" c1 c2
"""
# jobs; or steps, of which there is one besides the batch script's once somebody has made it
SQUEUE = """#!/bin/bash
case "$*" in
    *--steps*) echo 7.batch; if [ -e "$FAKE/step" ]; then echo 7.1; fi ;;
    *--jobs=*) id=$*; id=${id##*--jobs=}; grep -s "^${id%% *}|" "$FAKE/squeue" | cut -d"|" -f2- ;;
    *) cat "$FAKE/squeue" 2>/dev/null || true ;;
esac
"""
# the nodes of a job, its state, and whether a requeue was asked for
SCONTROL = """#!/bin/bash
case "$*" in
    *hostnames*) printf "%s\\n" ${3//,/ } ;;
    requeue*) echo "$*" >>"$FAKE/requeued"; kill -TERM "$SCRIPT" ;;
    *) echo "JobId=7 Reason=None JobState=$(cat "$FAKE/job_state" 2>/dev/null || echo RUNNING)" ;;
esac
"""
# notes what it was asked to run; the first line of `codes` is its exit code, and the word that a rank leaves
SRUN = """#!/bin/bash
for word in "$@"; do printf "%s\\n" "$word"; done >"$FAKE/srun.$(ls "$FAKE" | grep -c srun)"
code=; read -r code word <"$FAKE/codes"; sed -i 1d "$FAKE/codes"
if [ -n "$word" ]; then printf "%b\\n" "$word" >"$SCLDM_FAILURE"; fi
exit "${code:-0}"
"""
COMMANDS = {"sbatch": SBATCH, "sinfo": SINFO, "squeue": SQUEUE, "scontrol": SCONTROL, "srun": SRUN}


def train(tmp_path: Path) -> list[str]:
    """With a batch that can be split over 1 to 6 nodes of 8 ranks."""
    words = ["vae/tiny", "data.shards=some shards", "train.global_batch=960", "hardware.micro_batch=1"]
    return ["train", "vae", *words, f"run_dir={tmp_path}/my runs/50 % vae"]
