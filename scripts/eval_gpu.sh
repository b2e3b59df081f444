#!/usr/bin/env bash
# Measures accuracy on a machine with a GPU and without a network; needs torch, transformers and safetensors there, and no build.
#
#   scripts/eval_gpu.sh TEXT [SECONDS] [arguments of kvarn.eval.campaign ...]
#
# TEXT: made where the packages are, by: python -m kvarn.eval.held_out TEXT. OUT: the folder of the results; default build/eval.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
text=${1:?the held-out text}
seconds=${2:-480}
out=${OUT:-build/eval}
export HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" scripts/eval_without_build.py --out "$out" --text "$text" --seconds "$seconds" "${@:3}"
