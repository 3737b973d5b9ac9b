#!/usr/bin/env bash
# Set up what the tests need, and run them: the quick and the slow ones.
#   bash tests/run.sh [--quick | --all] [PYTEST ARGUMENTS]
#   --quick  only the quick ones (two minutes)
#   --all    the exhaustive ones too (hours)
# GPUs are hidden; on one, the kernels are tested by: SCLDM_TEST_GPU=1 bash tests/run.sh tests/scldm/kernels tests/scldm/model
# Paths among the arguments are relative to the checkout. Files of tests run beside one another, on as many cores as there
# are, at most four; `-n 0` runs them one after another, and shows what they print with `-s`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
selection="not exhaustive"
arguments=()
for word in "$@"; do
    case $word in
        --quick) selection="not slow and not exhaustive" ;;
        --all) selection="" ;;
        *) arguments+=("$word") ;;
    esac
done
python=$(bash "$root/launch/setup.sh" all,test)
cd "$root"
export PATH="${python%/*}:$PATH" # the commands that came with the packages
exec "$python" -m pytest -m "$selection" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
    --durations 25 ${arguments[@]+"${arguments[@]}"}
