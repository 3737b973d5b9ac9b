#!/usr/bin/env bash
# Set up what the tests need, and run them: the quick and the slow ones.
#   bash tests/run.sh [--quick | --all] [--as PROCESSOR] [PYTEST ARGUMENTS]
#   --quick  only the quick ones (two minutes on two cores), of less than a second each
#   --all    the exhaustive ones too (hours)
#   --as     those whose verdict depends on rounding (mark `numerical`), with the instructions of another processor:
#            lowest (SSE only), avx2 (and two threads), avx512 (where the processor has it). With -m "not exhaustive" as a
#            PYTEST ARGUMENT, all tests. With --quick those of one process, also the heavy ones
# GPUs are hidden; on one, the kernels are tested by: SCLDM_TEST_GPU=1 bash tests/run.sh tests/scldm/kernels tests/scldm/model
# Paths among the arguments are relative to the checkout. Files of tests run beside one another, on as many cores as there
# are, at most four; `-n 0` runs them one after another, and shows what they print with `-s`.
# A process that crashes fails its test and ends the run: pytest-xdist 3.8 may wait for ever once it has replaced one
# (pytest-xdist issue 1378).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
selection="not exhaustive"
arguments=()
as=
while [ $# -gt 0 ]; do
    case $1 in
        --quick) selection="not slow and not heavy and not exhaustive" ;;
        --all) selection="" ;;
        --as)
            as=${2:-nothing}
            if [ $# -gt 1 ]; then shift; fi
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
case $as in # torch's own kernels, oneDNN, MKL, OpenBLAS (numpy and scipy)
    "") ;;
    lowest)
        export ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE
        export OPENBLAS_CORETYPE=Nehalem
        ;;
    avx2)
        export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell
        export SCLDM_TEST_THREADS=2 OMP_WAIT_POLICY=PASSIVE # else threads of two tests at a time wait for each other
        ;;
    avx512) export ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512 ;;
    *)
        echo "tests/run.sh: error: --as $as must be lowest, avx2 or avx512" >&2
        exit 2
        ;;
esac
if [ -n "$as" ]; then selection="numerical${selection:+ and ${selection/ and not heavy/}}"; fi
python=$(bash "$root/launch/setup.sh" all,test)
cd "$root"
export PATH="${python%/*}:$PATH" # the commands that came with the packages
exec "$python" -m pytest -m "$selection" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
    --max-worker-restart 0 --durations 25 ${arguments[@]+"${arguments[@]}"}
