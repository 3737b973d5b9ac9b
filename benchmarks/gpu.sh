#!/usr/bin/env bash
# Settle the open figures of a GPU, in nine minutes at most: parity, profile, benchmarks, training, generation.
#   bash benchmarks/gpu.sh [--out runs/gpu] [--seconds 540] [--only NAME,...] [--commit COMMIT] [--cpu]
# Needs python3 (or $PYTHON) >= 3.11 with a torch for CUDA. Wheels in .whl/ are installed into a folder of this run alone,
# without a package index: `python -m benchmarks.gpu_wheels` collects them on a machine that has one.
# Leaves gpu.json (what was measured on what, and what failed or was skipped, with the reason) and gpu.log. Run it again to
# resume: what is done for these sources is not repeated.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if compgen -G ".whl/*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$site" .whl/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" -m benchmarks.gpu --spent "$SECONDS" "$@"
