#!/usr/bin/env bash
# Set up what the tests need, and run them: the quick and the slow ones.
#   bash tests/run.sh [--quick | --all] [PYTEST ARGUMENTS]
#   --quick  only the quick ones (two minutes)
#   --all    the exhaustive ones too (hours)
# Paths among the arguments are relative to the checkout.
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
exec "$python" -m pytest -m "$selection" ${arguments[@]+"${arguments[@]}"}
