#!/bin/bash
# Convert a Qwen3 on the GPUs of this machine, and export it for SGLang and LMDeploy:
#     hildanext init --preset qwen3-1.7b-sdar
#     PROCESSES=8 bash deploy/qwen3_sdar.sh hildanext.json RUN OUT [SECTION.KEY=VALUE ...]
# One process for each GPU. Run it again after an interruption: what is done is kept, and the training resumes.
set -euo pipefail
usage="usage: PROCESSES=N bash deploy/qwen3_sdar.sh CONFIG.json RUN OUT [SECTION.KEY=VALUE ...]"
config=${1:?$usage}
run=${2:?$usage}
out=${3:?$usage}
processes=${PROCESSES:?$usage}
shift 3
options=(--config "$config")
for item in "$@"; do options+=(--set "$item"); done
paths=$(python -c 'import sys; from hildanext.config import load_config; paths = load_config(sys.argv[1], sys.argv[2:]).paths; print(paths.data, paths.runs)' "$config" "$@")
read -r data runs <<< "$paths"

if [ ! -e "$data/tokenized/train.rows/meta.json" ]; then
    python -m hildanext.cli prepare-data "${options[@]}"
    python -m hildanext.cli tokenize "${options[@]}"
fi
if [ ! -e "$runs/$run/merged" ]; then
    resume=()
    if [ -e "$runs/$run/config.json" ]; then resume=(--resume); fi
    torchrun --standalone --nproc-per-node "$processes" -m -- hildanext.cli convert-wsd "${options[@]}" --run "$run" "${resume[@]}"
    python -m hildanext.cli merge-topk "${options[@]}" --run "$run"
fi
python -m hildanext.cli export "$runs/$run/merged" --to sdar --out "$out"
