#!/bin/sh
# All figures from a GPU machine that is there for minutes; see docs/speed.md and gpu_run.py.
#
#   sh benchmarks/gpu_run.sh prepare BUNDLE   here, without a GPU: what travels, in .gpu
#   sh benchmarks/gpu_run.sh 1                on the machine: correctness and the kernels' figures
#   sh benchmarks/gpu_run.sh 2                on the machine: dense and pruned models
#
# With --dry-run 1 and 2 run in a tiny form on the CPU. PYTHON names the interpreter; results go
# into $OUT, if that is set.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/sparsemm-triton}"
export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-${TMPDIR:-/tmp}/sparsemm-vllm-cache}"
exec "${PYTHON:-python3}" "$here/gpu_run.py" "$@"
