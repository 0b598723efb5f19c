#!/usr/bin/env bash
# On a machine with a GPU: its tests, then the benchmark, in at most 9 minutes. Needs torch, triton, pytest and
# hypothesis; nothing is installed. Results go to bench/results/, or to $OUT where that is set.
#   bash bench/gpu/run.sh            PYTHON=python3.12 bash bench/gpu/run.sh --only logits
# Without a GPU, `bash bench/gpu/run.sh --small` runs all of it on the CPU at tiny shapes, which measures nothing.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
results=${OUT:-bench/results}
mkdir -p "$results"

# the package as it would be installed: prefixloss with the kernels inside it
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/prefixloss"
ln -s "$PWD"/prefixloss/* "$tree/prefixloss/"
export PYTHONPATH="$tree:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

status=0
tests=(kernels/test_kernels backends/test_operators backends/test_triton_backend)
[[ " $* " == *" --small "* ]] && tests=(kernels/test_tune)
running=()
for name in "${tests[@]}"; do
    timeout 200 "$python" -m pytest -m "not slow" -q -p no:cacheprovider "tests/$name.py" > "$results/gpu-${name#*/}.txt" 2>&1 &
    running+=($!)
done
for process in "${running[@]}"; do wait "$process" || status=1; done
for name in "${tests[@]}"; do
    echo "$name: $results/gpu-${name#*/}.txt"
    tail -n 3 "$results/gpu-${name#*/}.txt"
done
timeout 285 "$python" -m bench.gpu --seconds 255 --json "$results/gpu.json" "$@" || status=1
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        timeout 25 compute-sanitizer --tool "$tool" "$python" -m bench.gpu --small --seconds 20 --only hidden logits few 2>&1 | tail -3 | tee "$results/sanitizer-$tool.txt"
    done
fi
exit $status
