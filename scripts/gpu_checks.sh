#!/usr/bin/env bash
# The tests that need a GPU, then its benchmark, within a time limit and with what there is kept at every moment:
#   scripts/gpu_checks.sh SECONDS FOLDER [flags of `python -m lora_nb bench --gpu`, such as --gpu_cases sd15:4 sdxl:1]
# PYTHON names the interpreter. In FOLDER lie tests.txt, bench.txt, BENCHMARKS.md and gpu.json afterwards.
set -u
limit=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
shift 2
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
work=$(mktemp -d)
export PYTHONUNBUFFERED=1 LORA_NB_CACHE=$work/cache LORA_NB_RUNS=$work/runs
nvidia-smi > "$folder/nvidia-smi.txt" 2>&1

timeout -k 5 $((limit * 2 / 5)) "$python" -m pytest tests/test_graphed.py -m gpu --durations=10 -p no:cacheprovider \
    > "$folder/tests.txt" 2>&1
tests=$?
tail -n 25 "$folder/tests.txt"

# It writes its tables after every row, so that the limit costs one row. A training that is asked to end ends in peace
# and the next row begins, so it is not asked twice.
timeout -k 5 $((limit - SECONDS - 10)) "$python" -m lora_nb bench --gpu --work "$work" --out "$folder/BENCHMARKS.md" "$@" \
    > "$folder/bench.txt" 2>&1
cat "$folder/bench.txt"
cp "$work/gpu.json" "$folder/" 2> /dev/null
exit $tests
