#!/usr/bin/env bash
# All that a GPU is wanted for, within 9 minutes and without a network; see "A GPU in one call" in benchmarks/README.md.
#   bash benchmarks/gpu/run.sh                 # results in $OUT, or outputs/gpu
#   bash benchmarks/gpu/run.sh --tiny          # every part in small, on a CPU too
#   bash benchmarks/gpu/run.sh --only stage1 vlm
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if compgen -G "benchmarks/gpu/wheels/*.whl" > /dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" benchmarks/gpu/wheels/*.whl
    export PYTHONPATH="$site:$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
else
    export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1
"$python" benchmarks/gpu/runner.py --output "${OUT:-outputs/gpu}" "$@"
